// AVX2: vpmaddubsw adds pairs of unsigned * signed bytes in 16 bits (kernels.h proves that ours fit), vpmaddwd pairs of those.
// The products of ternary weights are so small that many pairs are added in 16 bits before, which int8 weights do not allow:
// two instructions for 32 multiply-adds where int8 takes three.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt")
#endif

namespace ternary {
namespace avx2 {
#define ISA_NAME "avx2"
#define LANES 8
#define VECTORS 2
#define PIXELS 4
#define TILES4 3
#define TILES5 2
#define TILES6 2
#define WINOGRAD_BYTES 9
typedef __m256i vec;

static inline vec load_ints(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store_ints(int32_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline vec load_weights(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline vec broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
// Weights -1, 0, 1 of groups S and S + 1, S = 0 or 2, by tables of what the four bits of both stand for.
template <int S>
static inline void two_groups(vec codes, vec& low, vec& high) {
  const vec both = _mm256_and_si256(S == 0 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
  low = _mm256_shuffle_epi8(_mm256_set1_epi32(0x0100FF00), both);
  high = _mm256_shuffle_epi8(S == 0 ? _mm256_set_epi32(0x01010101, 0, -1, 0, 0x01010101, 0, -1, 0)
                                    : _mm256_set_epi32(-1, 0, 0x01010101, 0, -1, 0, 0x01010101, 0), both);
}
template <Weights W>
static inline vec dot(vec acc, vec a, vec w) {
  if constexpr (W != Weights::kInt8)
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), _mm256_set1_epi16(1)));
  // Even and odd bytes apart, as 16-bit numbers: exact.
  const vec a_even = _mm256_and_si256(a, _mm256_set1_epi16(255)), a_odd = _mm256_srli_epi16(a, 8);
  const vec w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), w_odd = _mm256_srai_epi16(w, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(a_even, w_even), _mm256_madd_epi16(a_odd, w_odd)));
}
// Products of unsigned bytes with signed ones, added in pairs to 16-bit sums: four unsigned bytes from memory with one or two
// vectors, or a vector with four signed ones. By intrinsics, GCC makes all products first and spills them.
typedef int32_t four_bytes __attribute__((aligned(1), may_alias));
static inline void add_pairs(vec (&sums)[1], const uint8_t* four, const vec (&w)[1]) {
  vec a;
  __asm__("vpbroadcastd %3, %1\n\tvpmaddubsw %2, %1, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sums[0]), "=&x"(a) : "x"(w[0]), "m"(*(const four_bytes*)four));
}
static inline void add_pairs(vec (&sums)[2], const uint8_t* four, const vec (&w)[2]) {
  vec a, pairs;
  __asm__("vpbroadcastd %6, %2\n\tvpmaddubsw %4, %2, %3\n\tvpmaddubsw %5, %2, %2\n\tvpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
          : "+x"(sums[0]), "+x"(sums[1]), "=&x"(a), "=&x"(pairs) : "x"(w[0]), "x"(w[1]), "m"(*(const four_bytes*)four));
}
static inline vec dot_four(vec sums, vec a, const uint8_t* four) {
  vec pairs;
  __asm__("vpbroadcastd %3, %1\n\tvpmaddubsw %1, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sums), "=&x"(pairs) : "x"(a), "m"(*(const four_bytes*)four));
  return sums;
}
// acc and the products of pairs of 16-bit numbers with two from memory.
static inline vec dot_two(vec acc, vec a, const uint8_t* two) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, broadcast(two))); }
static inline vec widen(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
// `unit` times 16-bit sums, pairs of them, to 32-bit ones.
static inline vec add_sums(vec acc, vec sums, int unit) { return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16((short)unit))); }
#define SUMS_IN_PAIRS
// Of eight bytes, those whose bit is set, side by side.
static inline uint64_t kept_bytes_(uint64_t eight, uint64_t bits) { return _pext_u64(eight, _pdep_u64(bits, 0x0101010101010101) * 255); }
#define kept_bytes kept_bytes_
static inline __m256 bytes_to_floats_(int64_t eight) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight))); }
#define bytes_to_floats(b) ((floats)bytes_to_floats_((int64_t)(b)))
static inline int64_t ints_to_bytes_(__m256i i) {
  const __m256i four = _mm256_shuffle_epi8(i, _mm256_set1_epi32(0x0C080400));
  return _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
}
#define ints_to_bytes(i) ((bytes)ints_to_bytes_((__m256i)(i)))
// Two vectors of integers of at most 255 as bytes, the first vector's first; what is below 0 becomes 0.
static inline __m128i pack_bytes_(__m256i a, __m256i b) {
  const __m256i words = _mm256_packs_epi32(a, b), mixed = _mm256_packus_epi16(words, words);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(mixed), _mm256_extracti128_si256(mixed, 1));
}
#define PACKED 2
#define pack_bytes(v) pack_bytes_((__m256i)v[0], (__m256i)v[1])
#define rounded(f) ((ints)_mm256_cvtps_epi32((__m256)(f)))
#define multiply_add(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
static inline float sum_of_(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float largest_of_(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#define larger(a, b) ((floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define smaller(a, b) ((floats)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define sum_of(v) sum_of_((__m256)(v))
#define largest_of(v) largest_of_((__m256)(v))
// lookup: of 16 floats those that the low four bits of each lane of i name.
static inline __m256 lookup_(const float* table, __m256i i) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // by the sign
}
#define lookup(table, i) ((floats)lookup_(table, (__m256i)(i)))
#include "body.h"
}  // namespace avx2
}  // namespace ternary
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const ternary::Kernels* ternary::avx2_kernels() {
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return has ? &avx2::table : nullptr;
}
#else
const ternary::Kernels* ternary::avx2_kernels() { return nullptr; }
#endif
