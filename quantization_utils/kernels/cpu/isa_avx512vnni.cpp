// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds groups of four to 16 int32 lanes.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__linux__) && __has_include(<amxint8intrin.h>)  // so new is the compiler, and with it the assembler
#define TERNARY_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

namespace ternary {
namespace avx512vnni {
#define ISA_NAME "avx512vnni"
#define LANES 16
#define VECTORS 4
#define PIXELS 6
#define TILES4 6
#define TILES5 5
#define TILES6 4
#define WINOGRAD_BYTES 5
typedef __m512i vec;

static inline vec load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline void store_ints(int32_t* p, vec v) { _mm512_storeu_si512(p, v); }
static inline vec load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline vec broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
template <typename T>
static inline T load_masked_(const void* from, int size) {  // memcpy of so many bytes is a call
  if constexpr (sizeof(T) == 64) return (T)_mm512_maskz_loadu_epi8(~0ull >> (64 - size), from);
  else return (T)_mm_maskz_loadu_epi8((__mmask16)((1u << size) - 1), from);
}
template <typename T>
static inline void store_masked_(void* to, T value, int size) {
  if constexpr (sizeof(T) == 64) _mm512_mask_storeu_epi8(to, ~0ull >> (64 - size), (__m512i)value);
  else _mm_mask_storeu_epi8(to, (__mmask16)((1u << size) - 1), (__m128i)value);
}
#define load_masked load_masked_
#define store_masked store_masked_
template <int S>
static inline vec plane(vec codes) {  // shifting 32-bit lanes is fine: the AND drops what crossed a byte's border
  const vec mask = _mm512_set1_epi8((char)0xC0);
  if (S == 3) return _mm512_and_si512(codes, mask);
  return _mm512_ternarylogic_epi32(_mm512_slli_epi32(codes, 6 - 2 * S), mask, _mm512_set1_epi8((char)0x80), 0x6A);  // (x & mask) ^ 128
}
template <int S>
static inline vec in_place(vec codes) { return _mm512_and_si512(codes, _mm512_set1_epi8((char)(3 << 2 * S))); }
template <Weights>
static inline vec dot(vec acc, vec a, vec w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(w));  // the intrinsic makes GCC copy every accumulator
  return acc;
}
// As dot, of unsigned bytes with four signed ones from memory.
static inline vec dot_four(vec acc, vec a, const uint8_t* four) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*(const int32_t __attribute__((may_alias))*)four));
  return acc;
}
// As dot_four, of pairs of 16-bit numbers.
static inline vec dot_two(vec acc, vec a, const uint8_t* two) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*(const int32_t __attribute__((may_alias))*)two));
  return acc;
}
static inline vec widen(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
// Of eight bytes, those whose bit is set, side by side.
static inline uint64_t kept_bytes_(uint64_t eight, uint64_t bits) { return _pext_u64(eight, _pdep_u64(bits, 0x0101010101010101) * 255); }
#define kept_bytes kept_bytes_
static int gather_plain(const uint64_t* used, int words, const uint8_t* in, uint8_t* out);
// By vpcompressb where there is one: it is newer than VNNI, so the compiler is not told that it may use it.
static int gather_(const uint64_t* used, int words, const uint8_t* in, uint8_t* out) {
  static const bool can_compress = __builtin_cpu_supports("avx512vbmi2");
  if (!can_compress) return gather_plain(used, words, in, out);
  uint8_t* to = out;
  for (int i = 0; i < words; ++i) {
    vec kept;
    __asm__("vpcompressb %1, %0%{%2%}%{z%}" : "=v"(kept) : "v"(_mm512_loadu_si512(in + i * 64)), "Yk"((__mmask64)used[i]));
    _mm512_storeu_si512(to, kept);
    to += __builtin_popcountll(used[i]);
  }
  return (int)(to - out);
}
#define gather gather_
static inline __m512 bytes_to_floats_(__m128i b) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b)); }
#define bytes_to_floats(b) ((floats)bytes_to_floats_((__m128i)(b)))
#define ints_to_bytes(i) ((bytes)_mm512_cvtepi32_epi8((__m512i)(i)))
// Four vectors of integers of at most 255 as bytes, the first vector's first; what is below 0 becomes 0.
static inline __m512i pack_bytes_(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i mixed = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
}
#define PACKED 4
#define pack_bytes(v) pack_bytes_((__m512i)v[0], (__m512i)v[1], (__m512i)v[2], (__m512i)v[3])
#define rounded(f) ((ints)_mm512_cvtps_epi32((__m512)(f)))
#define multiply_add(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define larger(a, b) ((floats)_mm512_max_ps((__m512)(a), (__m512)(b)))  // of the plain comparison GCC makes three instructions
#define smaller(a, b) ((floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define sum_of(v) _mm512_reduce_add_ps((__m512)(v))
#define largest_of(v) _mm512_reduce_max_ps((__m512)(v))
// lookup: of 16 floats those that the low four bits of each lane of i name.
#define lookup(table, i) ((floats)_mm512_permutexvar_ps((__m512i)(i), _mm512_loadu_ps(table)))
#include "body.h"
#ifdef TERNARY_AMX
#include "body_tiles.h"
#endif
}  // namespace avx512vnni

}  // namespace ternary
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const ternary::Kernels* ternary::avx512vnni_kernels() {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
  return has ? &avx512vnni::table : nullptr;
}

#ifdef TERNARY_AMX
// Whether the processor has tiles and the system lets this process use them, which it has to be asked.
static bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kInt8Products = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kInt8Products)) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

const ternary::Kernels* ternary::amx_kernels() {
  static const bool has = avx512vnni_kernels() && has_tiles();
  if (!has) return nullptr;
  static const Kernels table = avx512vnni::with_tiles(avx512vnni::table);
  return &table;
}
#else
const ternary::Kernels* ternary::amx_kernels() { return nullptr; }
#endif
#else
const ternary::Kernels* ternary::amx_kernels() { return nullptr; }
const ternary::Kernels* ternary::avx512vnni_kernels() { return nullptr; }
#endif
