// The kernels, written once over a few vector primitives that isa_*.cpp define before including this file, inside their
// own namespace and target: LANES, VECTORS, PIXELS, `vec` (LANES int32), load_weights, broadcast, dot<Weights>, dot_four, and
// for 2-bit weights plane<S> and in_place<S>, or where SUMS_IN_PAIRS is defined two_groups<S>, add_pairs and add_sums.
// No header with inline functions may be included here: their copies would be compiled for this instruction set.

typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t unsigned_ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t wide __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};

// Calls `with` with `count`, LEAST ... MOST, as a constant.
template <int MOST, int LEAST = 1, typename With>
static inline void with_count(int count, const With& with) {
  if (count == MOST) return with(Constant<MOST>());
  if constexpr (MOST > LEAST) with_count<MOST - 1, LEAST>(count, with);
}

// The first `size` bytes of a T, at least one.
template <typename T>
static inline T load_part(const void* from, int size) {
#ifdef load_masked
  return load_masked<T>(from, size);
#else
  T value = {};
  __builtin_memcpy(&value, from, size);
  return value;
#endif
}

template <typename T>
static inline void store_part(void* to, T value, int size) {
  if (size == (int)sizeof(T)) __builtin_memcpy(to, &value, sizeof(T));  // one instruction
#ifdef store_masked
  else store_masked(to, value, size);
#else
  else __builtin_memcpy(to, &value, size);
#endif
}

#include "body_functions.h"

// Loops over pixels and vectors, unrolled by the preprocessor: with indices that are constants from the start the compiler
// keeps the accumulators in registers (an ordinary loop is unrolled too late for that, and they pass through the stack).
#define EACH(I, COUNT, N, ...) if constexpr (N < COUNT) { constexpr int I = N; __VA_ARGS__ }
#define EACH_PIXEL(...) EACH(p, P, 0, __VA_ARGS__) EACH(p, P, 1, __VA_ARGS__) EACH(p, P, 2, __VA_ARGS__) \
                        EACH(p, P, 3, __VA_ARGS__) EACH(p, P, 4, __VA_ARGS__) EACH(p, P, 5, __VA_ARGS__)
#define EACH_VECTOR(...) EACH_J(0, __VA_ARGS__) EACH_J(1, __VA_ARGS__) EACH_J(2, __VA_ARGS__) EACH_J(3, __VA_ARGS__)
#define EACH_QUARTER(...) EACH(q, 4, 0, __VA_ARGS__) EACH(q, 4, 1, __VA_ARGS__) EACH(q, 4, 2, __VA_ARGS__) EACH(q, 4, 3, __VA_ARGS__)
#define EACH_PACKED(...) EACH(q, PACKED, 0, __VA_ARGS__) EACH(q, PACKED, 1, __VA_ARGS__) EACH(q, PACKED, 2, __VA_ARGS__) EACH(q, PACKED, 3, __VA_ARGS__)
#define EACH_J(N, ...) if constexpr (N < J) { constexpr int j = N; __VA_ARGS__ }

constexpr int kPrefetchBytes = 4096, kTilePrefetchBytes = 2048;  // a tile uses each weight longer

#ifdef SUMS_IN_PAIRS
#include "body_pairs.h"
#else
// One pixel and 2-bit weights (a linear layer at batch 1): the weights' bits are used where they stand, see kernels.h.
template <int J>
static void row_kernel(const Tile& t, int32_t* out) {
  vec acc[4][J];
  EACH_VECTOR(acc[0][j] = acc[1][j] = acc[2][j] = vec{}; acc[3][j] = load_ints(t.init + j * LANES);)
  const vec ones = (vec)(ints{} + 0x01010101);
  vec lanes[4] = {};  // lane l: sums of the activations of group l % 4; four, for a single one would wait for itself
  const uint8_t* w = t.weights;
  for (int run = 0; run < t.runs; ++run) {
    const uint8_t* a = t.pixels[0] + run * t.run_stride;
    for (int64_t g = 0; g < t.groups; ++g) {
      vec codes[J];
      // Each weight is used once, and out of order the processor sees too few loads ahead to hide an outer cache's latency.
      EACH_VECTOR(codes[j] = load_weights(w + j * LANES * 4); __builtin_prefetch(w + j * LANES * 4 + kPrefetchBytes);)
      w += J * LANES * 4;
#define TERNARY_PLANE(S)                                 \
  {                                                      \
    const vec x = broadcast(a + g * 16 + 4 * S);         \
    EACH_VECTOR(acc[S][j] = dot<Weights::kSmall>(acc[S][j], x, in_place<S>(codes[j]));) \
  }
      TERNARY_PLANE(0) TERNARY_PLANE(1) TERNARY_PLANE(2) TERNARY_PLANE(3)
#undef TERNARY_PLANE
    }
    constexpr int kVector = LANES * 4;
    const int64_t bytes_a_run = (int64_t)t.groups * 16;
    int64_t i = 0;
    for (; i + 4 * kVector <= bytes_a_run; i += 4 * kVector) {
      EACH_QUARTER(lanes[q] = dot<Weights::kSmall>(lanes[q], (vec)*(const ints*)(a + i + q * kVector), ones);)
    }
    for (; i + kVector <= bytes_a_run; i += kVector) lanes[0] = dot<Weights::kSmall>(lanes[0], (vec)*(const ints*)(a + i), ones);
    if (i < bytes_a_run) lanes[0] = dot<Weights::kSmall>(lanes[0], (vec)load_part<ints>(a + i, (int)(bytes_a_run - i)), ones);
  }
  int32_t by_lane[LANES], sum[4] = {0, 0, 0, 0};
  store_ints(by_lane, (vec)((ints)lanes[0] + (ints)lanes[1] + (ints)lanes[2] + (ints)lanes[3]));
  for (int l = 0; l < LANES; ++l) sum[l % 4] += by_lane[l];
  EACH_VECTOR(const ints y0 = (ints)acc[0][j] - 2 * sum[0]; const ints y1 = (ints)acc[1][j] - 8 * sum[1];
              const ints y2 = (ints)acc[2][j] - 32 * sum[2];
              store_ints(out + j * LANES, (vec)((ints)acc[3][j] + y0 * 64 + y1 * 16 + y2 * 4));)
}
#endif

// P pixels x J vectors of channels in registers; K in the inner loop. The widest has 24 accumulators of AVX-512's 32.
// take(pixel, vector, accumulator) gets them at the end.
template <Weights W, int P, int J, typename Take>
static inline void tile_kernel(const Tile& t, const Take& take) {
  vec acc[P][J];
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = load_ints(t.init + j * LANES);))
  const uint8_t* w = t.weights;
  const uint8_t* a[P];
  EACH_PIXEL(a[p] = t.pixels[p];)
  for (int run = 0; run < t.runs; ++run) {
    for (int64_t g = 0; g < t.groups; ++g) {
      vec b[J];
#ifndef SUMS_IN_PAIRS
      if constexpr (W == Weights::kTwoBit) {
        vec codes[J];
        EACH_VECTOR(codes[j] = load_weights(w + j * LANES * 4); __builtin_prefetch(w + j * LANES * 4 + kTilePrefetchBytes);)
#define TERNARY_PLANE(S)                                          \
  EACH_VECTOR(b[j] = plane<S>(codes[j]);)                         \
  EACH_PIXEL(const vec x = broadcast(a[p] + g * 16 + 4 * S);      \
             EACH_VECTOR(acc[p][j] = dot<W>(acc[p][j], x, b[j]);))
        TERNARY_PLANE(0) TERNARY_PLANE(1) TERNARY_PLANE(2) TERNARY_PLANE(3)
#undef TERNARY_PLANE
      } else
#endif
      {
        EACH_VECTOR(b[j] = load_weights(w + j * LANES * 4);)
        EACH_PIXEL(const vec x = broadcast(a[p] + g * 4);
                   EACH_VECTOR(acc[p][j] = dot<W>(acc[p][j], x, b[j]);))
      }
      w += J * LANES * 4;
    }
    EACH_PIXEL(a[p] += t.run_stride;)
  }
  EACH_PIXEL(EACH_VECTOR(take(p, j, acc[p][j]);))
}

template <Weights W, int P, int J>
static void accumulators(const Tile& t, int32_t* out) {
#ifndef SUMS_IN_PAIRS
  if constexpr (W == Weights::kTwoBit && P == 1) return row_kernel<J>(t, out);
#endif
  tile_kernel<W, P, J>(t, [=](int p, int j, vec acc) { store_ints(out + (p * J + j) * LANES, acc); });
}

template <Weights W>
static void multiply_weights(const Tile& t, int32_t* acc) {
  with_count<PIXELS>(t.count, [&]<int P>(Constant<P>) {
    with_count<VECTORS>((t.channels + LANES - 1) / LANES, [&]<int J>(Constant<J>) { accumulators<W, P, J>(t, acc); });
  });
}

static void multiply(Weights weights, const Tile& t, int32_t* acc) {
  switch (weights) {
    case Weights::kTwoBit: return multiply_weights<Weights::kTwoBit>(t, acc);
    case Weights::kSmall: return multiply_weights<Weights::kSmall>(t, acc);
    case Weights::kInt8: return multiply_weights<Weights::kInt8>(t, acc);
  }
}

static int gather_plain(const uint64_t* used, int words, const uint8_t* in, uint8_t* out) {
  uint8_t* to = out;
  for (int i = 0; i < words; ++i, in += 64) {
#ifdef kept_bytes
    for (int shift = 0; shift < 64; shift += 8) {
      const uint64_t bits = used[i] >> shift & 255;
      uint64_t eight;
      __builtin_memcpy(&eight, in + shift, 8);
      eight = kept_bytes(eight, bits);
      __builtin_memcpy(to, &eight, 8);
      to += __builtin_popcountll(bits);
    }
#else
    for (uint64_t bits = used[i]; bits; bits &= bits - 1) *to++ = in[__builtin_ctzll(bits)];
#endif
  }
  return (int)(to - out);
}
#ifndef gather
#define gather gather_plain
#endif

#include "body_epilogue.h"
#include "body_linear.h"
#include "body_winograd.h"
#include "body_rows.h"
#include "body_encoder.h"

static void nothing() {}

static const Kernels table = {ISA_NAME, LANES, VECTORS, PIXELS, {TILES4, TILES5, TILES6}, WINOGRAD_BYTES, nothing, nothing, multiply, multiply_rows, gather, finish, winograd_input, winograd, image_row,
                              quantize_row, max_row, add_row, layer_norm, transpose_keys, attention, peak_multiply_adds,
                              read_memory};
