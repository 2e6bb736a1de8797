// Plain C++ with the compiler's generic vectors: runs anywhere (SSE2, NEON), and is what the others are compared with.
#include "kernels.h"

namespace ternary {
namespace portable {
#define ISA_NAME "portable"
#define LANES 4
#define VECTORS 2
#define PIXELS 4
#define TILES4 2
#define TILES5 2
#define TILES6 2
#define WINOGRAD_BYTES 5
typedef int32_t vec __attribute__((vector_size(16), aligned(4), may_alias));

static inline vec load_ints(const int32_t* p) { return *(const vec*)p; }
static inline void store_ints(int32_t* p, vec v) { *(vec*)p = v; }
// A lane holds one channel's four weights, least significant byte first on every machine.
static inline vec load_weights(const uint8_t* p) {
  vec v;
  for (int i = 0; i < 4; ++i)
    v[i] = (int32_t)((uint32_t)p[4 * i] | (uint32_t)p[4 * i + 1] << 8 | (uint32_t)p[4 * i + 2] << 16 | (uint32_t)p[4 * i + 3] << 24);
  return v;
}
static inline vec broadcast(const uint8_t* p) {
  const int32_t four = (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
  return vec{four, four, four, four};
}
template <int S>
static inline vec plane(vec codes) {
  typedef uint32_t uvec __attribute__((vector_size(16)));
  const uvec top = ((uvec)codes << (6 - 2 * S)) & 0xC0C0C0C0u;
  return (vec)(S == 3 ? top : top ^ 0x80808080u);
}
template <int S>
static inline vec in_place(vec codes) { return codes & (vec{} + (int32_t)(0x03030303u << 2 * S)); }
// Bytes 0 and 2 (1 and 3) as 16-bit halves would be as fast only with a multiply-add of halves; four plain products are
// exact for every kind of weight.
template <Weights>
static inline vec dot(vec acc, vec a, vec w) {
  typedef uint32_t uvec __attribute__((vector_size(16)));
  const uvec ua = (uvec)a, uw = (uvec)w;
  acc += (vec)(ua & 255u) * ((vec)(uw << 24) >> 24);
  acc += (vec)((ua >> 8) & 255u) * ((vec)(uw << 16) >> 24);
  acc += (vec)((ua >> 16) & 255u) * ((vec)(uw << 8) >> 24);
  acc += (vec)(ua >> 24) * (w >> 24);
  return acc;
}
// As dot, of unsigned bytes with four signed ones from memory.
static inline vec dot_four(vec acc, vec a, const uint8_t* four) { return dot<Weights::kSmall>(acc, a, broadcast(four)); }
// As dot_four, of pairs of 16-bit numbers; the sums may wrap around.
static inline vec dot_two(vec acc, vec a, const uint8_t* two) {
  typedef uint32_t uvec __attribute__((vector_size(16)));
  int16_t w[2];
  __builtin_memcpy(w, two, 4);
  return (vec)((uvec)acc + (uvec)((vec)((uvec)a << 16) >> 16) * (uint32_t)w[0] + (uvec)(a >> 16) * (uint32_t)w[1]);
}
// LANES * 2 signed bytes as 16-bit numbers, the first of a pair in the lower half.
static inline vec widen(const uint8_t* p) {
  vec v;
  for (int i = 0; i < LANES; ++i) v[i] = (int32_t)((uint32_t)(uint16_t)(int8_t)p[2 * i] | (uint32_t)(int8_t)p[2 * i + 1] << 16);
  return v;
}
typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));
// a * b + c, rounded once.
static inline four_floats multiply_add(four_floats a, four_floats b, four_floats c) {
#ifdef __FP_FAST_FMAF  // not in the first x86-64, where it is a call
  return four_floats{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]), __builtin_fmaf(a[3], b[3], c[3])};
#else  // as the reference does
  typedef double doubles __attribute__((vector_size(32)));
  const doubles product = __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
  return __builtin_convertvector(product + __builtin_convertvector(c, doubles), four_floats);
#endif
}
#define bytes_to_floats(b) __builtin_convertvector(b, floats)
#define ints_to_bytes(i) __builtin_convertvector(i, bytes)
#define sum_of(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))
#define larger(a, b) ((a) > (b) ? (a) : (b))
#define smaller(a, b) ((a) < (b) ? (a) : (b))
#define largest_of(v) larger(larger((v)[0], (v)[2]), larger((v)[1], (v)[3]))
// lookup: of 16 floats those that the low four bits of each lane of i name.
#define lookup(table, i) (floats{(table)[((ints)(i))[0] & 15], (table)[((ints)(i))[1] & 15], (table)[((ints)(i))[2] & 15], (table)[((ints)(i))[3] & 15]})
#include "body.h"
}  // namespace portable

const Kernels* portable_kernels() { return &portable::table; }
}  // namespace ternary
