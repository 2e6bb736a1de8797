// One parallel region for a whole network: threads that stay awake between its phases and meet at a spinning barrier.
// A thread pool's wake-up costs as much as a layer; a barrier of running threads costs a fraction of a microsecond.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace ternary {

class Team;

// What a phase function of one thread sees.
class Member {
 public:
  Member(Team& team, int index) : team_(team), index_(index) {}
  int index() const { return index_; }
  // Calls work(item) for every item of 0 … items-1, each once, spread over the threads as they come free, then waits for all.
  template <typename Work>
  void share(int64_t items, const Work& work);
  void barrier();

 private:
  Team& team_;
  int index_;
};

// Runs body(member) on `threads` threads (the caller is one) and returns when all are done. One region at a time; threads are
// kept, spin for a short while after a region and then sleep. After fork() the child makes its own.
void parallel(int threads, const std::function<void(Member&)>& body);

class Team {
 public:
  int size = 1;
  std::atomic<int> arrived{0};
  std::atomic<uint32_t> generation{0};
  // Two counters in turn: one is reset while the other is in use.
  struct alignas(64) Counter { std::atomic<int64_t> next{0}; } counters[2];
  struct alignas(64) Phase { int which = 0; };
  Phase phase[256];
};

template <typename Work>
void Member::share(int64_t items, const Work& work) {
  int& which = team_.phase[index_].which;
  auto& next = team_.counters[which].next;
  if (index_ == 0) team_.counters[which ^ 1].next.store(0, std::memory_order_relaxed);
  for (;;) {
    const int64_t item = team_.size == 1 ? next.load(std::memory_order_relaxed) : next.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) break;
    if (team_.size == 1) next.store(item + 1, std::memory_order_relaxed);
    work(item);
  }
  which ^= 1;
  barrier();
}

}  // namespace ternary
