// Memory for weights and activations: zeroed, aligned to cache lines, and in huge pages where there is much of it. 14 MB of
// weights are 3,300 small pages, more than a processor's translation buffer holds, and every miss is a walk of the tables.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ternary {

constexpr size_t kHugePage = 2 << 20;

template <typename T>
struct HugeAllocator {
  typedef T value_type;
  HugeAllocator() = default;
  template <typename U>
  HugeAllocator(const HugeAllocator<U>&) {}
  T* allocate(size_t count) {
    const bool huge = count * sizeof(T) >= kHugePage / 2;
    const size_t alignment = huge ? kHugePage : 64;
    const size_t bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
    void* memory = std::aligned_alloc(alignment, bytes);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    return (T*)memory;
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  bool operator==(const HugeAllocator&) const { return true; }
};

typedef std::vector<uint8_t, HugeAllocator<uint8_t>> Bytes;
typedef std::vector<float, HugeAllocator<float>> Floats;

}  // namespace ternary
