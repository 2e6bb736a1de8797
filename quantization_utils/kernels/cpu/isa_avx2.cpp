// AVX2: vpmaddubsw adds pairs of unsigned * signed bytes in 16 bits (kernels.h proves that ours fit), vpmaddwd pairs of those.
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
typedef __m256i vec;

static inline vec load_ints(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store_ints(int32_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline vec load_weights(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline vec broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
template <int S>
static inline vec plane(vec codes) {
  const vec top = _mm256_and_si256(S == 3 ? codes : _mm256_slli_epi32(codes, 6 - 2 * S), _mm256_set1_epi8((char)0xC0));
  return S == 3 ? top : _mm256_xor_si256(top, _mm256_set1_epi8((char)0x80));
}
template <int S>
static inline vec in_place(vec codes) { return _mm256_and_si256(codes, _mm256_set1_epi8((char)(3 << 2 * S))); }
template <Weights W>
static inline vec dot(vec acc, vec a, vec w) {
  if constexpr (W != Weights::kInt8)
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), _mm256_set1_epi16(1)));
  // Even and odd bytes apart, as 16-bit numbers: exact.
  const vec a_even = _mm256_and_si256(a, _mm256_set1_epi16(255)), a_odd = _mm256_srli_epi16(a, 8);
  const vec w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), w_odd = _mm256_srai_epi16(w, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(a_even, w_even), _mm256_madd_epi16(a_odd, w_odd)));
}
// As dot, of unsigned bytes with four signed ones from memory.
static inline vec dot_four(vec acc, vec a, const uint8_t* four) { return dot<Weights::kSmall>(acc, a, broadcast(four)); }
// Of eight bytes, those whose bit is set, side by side.
static inline uint64_t kept_bytes_(uint64_t eight, uint64_t bits) { return _pext_u64(eight, _pdep_u64(bits, 0x0101010101010101) * 255); }
#define kept_bytes kept_bytes_
#define bytes_to_floats(b) __builtin_convertvector(b, floats)
#define ints_to_bytes(i) __builtin_convertvector(i, bytes)
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
