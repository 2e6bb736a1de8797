// The kernels, written once over a few vector primitives that isa_*.cpp define before including this file, inside their
// own namespace and target: LANES, VECTORS, PIXELS, `vec` (LANES int32), load_weights, plane<S>, broadcast, dot<Weights>.
// No header with inline functions may be included here: their copies would be compiled for this instruction set.

typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

template <typename T>
static inline T load_part(const void* from, int size) {
  T value = {};
  __builtin_memcpy(&value, from, size);
  return value;
}

// Loops over pixels and vectors, unrolled by the preprocessor: with indices that are constants from the start the compiler
// keeps the accumulators in registers (an ordinary loop is unrolled too late for that, and they pass through the stack).
#define EACH(I, COUNT, N, ...) if constexpr (N < COUNT) { constexpr int I = N; __VA_ARGS__ }
#define EACH_PIXEL(...) EACH(p, P, 0, __VA_ARGS__) EACH(p, P, 1, __VA_ARGS__) EACH(p, P, 2, __VA_ARGS__) \
                        EACH(p, P, 3, __VA_ARGS__) EACH(p, P, 4, __VA_ARGS__) EACH(p, P, 5, __VA_ARGS__)
#define EACH_VECTOR(...) EACH_J(0, __VA_ARGS__) EACH_J(1, __VA_ARGS__) EACH_J(2, __VA_ARGS__) EACH_J(3, __VA_ARGS__)
#define EACH_J(N, ...) if constexpr (N < J) { constexpr int j = N; __VA_ARGS__ }

// One pixel and 2-bit weights (a linear layer at batch 1): the weights' bits are used where they stand, see kernels.h.
template <int J>
static void row_kernel(const Tile& t, int32_t* out) {
  vec acc[4][J];
  EACH_VECTOR(acc[0][j] = acc[1][j] = acc[2][j] = vec{}; acc[3][j] = load_ints(t.init + j * LANES);)
  const vec ones = (vec)(ints{} + 0x01010101);
  vec lanes = vec{};  // lane l: the sum of the activations of group l % 4
  const uint8_t* w = t.weights;
  for (int run = 0; run < t.runs; ++run) {
    const uint8_t* a = t.pixels[0] + run * t.run_stride;
    for (int64_t g = 0; g < t.groups; ++g) {
      vec codes[J];
      EACH_VECTOR(codes[j] = load_weights(w + j * LANES * 4);)
      w += J * LANES * 4;
#define TERNARY_PLANE(S)                                 \
  {                                                      \
    const vec x = broadcast(a + g * 16 + 4 * S);         \
    EACH_VECTOR(acc[S][j] = dot<Weights::kSmall>(acc[S][j], x, in_place<S>(codes[j]));) \
  }
      TERNARY_PLANE(0) TERNARY_PLANE(1) TERNARY_PLANE(2) TERNARY_PLANE(3)
#undef TERNARY_PLANE
    }
    const int64_t bytes_a_run = (int64_t)t.groups * 16;
    for (int64_t i = 0; i < bytes_a_run; i += LANES * 4) {
      const int64_t left = bytes_a_run - i;
      const ints x = load_part<ints>(a + i, left < LANES * 4 ? (int)left : LANES * 4);
      lanes = dot<Weights::kSmall>(lanes, (vec)x, ones);
    }
  }
  int32_t by_lane[LANES], sum[4] = {0, 0, 0, 0};
  store_ints(by_lane, lanes);
  for (int l = 0; l < LANES; ++l) sum[l % 4] += by_lane[l];
  EACH_VECTOR(const ints y0 = (ints)acc[0][j] - 2 * sum[0]; const ints y1 = (ints)acc[1][j] - 8 * sum[1];
              const ints y2 = (ints)acc[2][j] - 32 * sum[2];
              store_ints(out + j * LANES, (vec)((ints)acc[3][j] + y0 * 64 + y1 * 16 + y2 * 4));)
}

// P pixels x J vectors of channels in registers; K in the inner loop. The widest has 24 accumulators of AVX-512's 32.
template <Weights W, int P, int J>
static void tile_kernel(const Tile& t, int32_t* out) {
  if constexpr (W == Weights::kTwoBit && P == 1) return row_kernel<J>(t, out);
  vec acc[P][J];
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = load_ints(t.init + j * LANES);))
  const uint8_t* w = t.weights;
  const uint8_t* a[P];
  EACH_PIXEL(a[p] = t.pixels[p];)
  for (int run = 0; run < t.runs; ++run) {
    for (int64_t g = 0; g < t.groups; ++g) {
      vec b[J];
      if constexpr (W == Weights::kTwoBit) {
        vec codes[J];
        EACH_VECTOR(codes[j] = load_weights(w + j * LANES * 4);)
#define TERNARY_PLANE(S)                                          \
  EACH_VECTOR(b[j] = plane<S>(codes[j]);)                         \
  EACH_PIXEL(const vec x = broadcast(a[p] + g * 16 + 4 * S);      \
             EACH_VECTOR(acc[p][j] = dot<W>(acc[p][j], x, b[j]);))
        TERNARY_PLANE(0) TERNARY_PLANE(1) TERNARY_PLANE(2) TERNARY_PLANE(3)
#undef TERNARY_PLANE
      } else {
        EACH_VECTOR(b[j] = load_weights(w + j * LANES * 4);)
        EACH_PIXEL(const vec x = broadcast(a[p] + g * 4);
                   EACH_VECTOR(acc[p][j] = dot<W>(acc[p][j], x, b[j]);))
      }
      w += J * LANES * 4;
    }
    EACH_PIXEL(a[p] += t.run_stride;)
  }
  EACH_PIXEL(EACH_VECTOR(store_ints(out + (p * J + j) * LANES, acc[p][j]);))
}

template <Weights W, int P>
static void multiply_pixels(const Tile& t, int32_t* acc) {
  switch ((t.channels + LANES - 1) / LANES) {
    case 1: return tile_kernel<W, P, 1>(t, acc);
    case 2: return tile_kernel<W, P, 2>(t, acc);
#if VECTORS > 2
    case 3: return tile_kernel<W, P, 3>(t, acc);
    case 4: return tile_kernel<W, P, 4>(t, acc);
#endif
  }
}

template <Weights W>
static void multiply_weights(const Tile& t, int32_t* acc) {
  switch (t.count) {
    case 1: return multiply_pixels<W, 1>(t, acc);
    case 2: return multiply_pixels<W, 2>(t, acc);
    case 3: return multiply_pixels<W, 3>(t, acc);
    case 4: return multiply_pixels<W, 4>(t, acc);
#if PIXELS > 4
    case 5: return multiply_pixels<W, 5>(t, acc);
    case 6: return multiply_pixels<W, 6>(t, acc);
#endif
  }
}

static void multiply(Weights weights, const Tile& t, int32_t* acc) {
  switch (weights) {
    case Weights::kTwoBit: return multiply_weights<Weights::kTwoBit>(t, acc);
    case Weights::kSmall: return multiply_weights<Weights::kSmall>(t, acc);
    case Weights::kInt8: return multiply_weights<Weights::kInt8>(t, acc);
  }
}

// Adding and removing 1.5 * 2^23 rounds a float of magnitude < 2^22 to the nearest integer, ties to even, as rint does; the
// low bits of the sum are that integer. Values are clamped first (the bounds are integers, so the order does not matter).
static constexpr float kRound = 12582912.0f;

enum class Residual { kNone, kBytes, kFloats };

template <Residual R, bool BYTES, bool ROW_SCALE>
static void finish_kind(const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int channels) {
  const int vectors = (channels + LANES - 1) / LANES;
  const floats top = floats{} + (float)e.out_max;
  for (int j = 0; j < vectors; ++j) {
    const int n = channels - j * LANES < LANES ? channels - j * LANES : LANES;
    const floats channel_gain = *(const floats*)(e.gain + j * LANES), bias = *(const floats*)(e.bias + j * LANES);
    for (int p = 0; p < pixels; ++p) {
      if (!o.out[p]) continue;
      floats gain = channel_gain;
      if constexpr (ROW_SCALE) gain = gain * o.row_scale[p];
      floats y = __builtin_convertvector(*(const ints*)(acc + (p * vectors + j) * LANES) >> e.shift, floats) * gain;
      y = y + bias;
      if constexpr (R == Residual::kFloats) {
        const float* from = (const float*)o.residual[p] + j * LANES;
        y = y + (n == LANES ? *(const floats*)from : load_part<floats>(from, n * 4)) * e.residual_gain;
      } else if constexpr (R == Residual::kBytes) {
        const uint8_t* from = (const uint8_t*)o.residual[p] + j * LANES;
        y = y + bytes_to_floats(n == LANES ? *(const bytes*)from : load_part<bytes>(from, n)) * e.residual_gain;
      }
      if constexpr (BYTES) {  // the clamp is the ReLU
        y = y > 0.0f ? y : floats{};
        y = y < top ? y : top;
        const bytes q = ints_to_bytes((ints)(y + kRound) & 255);
        uint8_t* to = (uint8_t*)o.out[p] + j * LANES;
        if (n == LANES) *(bytes*)to = q;
        else __builtin_memcpy(to, &q, n);
      } else {
        if (e.relu) y = y > 0.0f ? y : floats{};
        float* to = (float*)o.out[p] + j * LANES;
        if (n == LANES) *(floats*)to = y;
        else __builtin_memcpy(to, &y, n * 4);
      }
    }
  }
}

static void finish(const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int channels) {
  const bool to_bytes = e.out_max != 0;
  if (o.has_row_scale) return finish_kind<Residual::kNone, false, true>(e, o, acc, pixels, channels);
  if (!o.has_residual) {
    if (to_bytes) return finish_kind<Residual::kNone, true, false>(e, o, acc, pixels, channels);
    return finish_kind<Residual::kNone, false, false>(e, o, acc, pixels, channels);
  }
  if (o.residual_is_float) {
    if (to_bytes) return finish_kind<Residual::kFloats, true, false>(e, o, acc, pixels, channels);
    return finish_kind<Residual::kFloats, false, false>(e, o, acc, pixels, channels);
  }
  if (to_bytes) return finish_kind<Residual::kBytes, true, false>(e, o, acc, pixels, channels);
  return finish_kind<Residual::kBytes, false, false>(e, o, acc, pixels, channels);
}

// Winograd F(2x2,3x3): V = B^T d B with B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1], in bytes modulo 256. Activations are at
// most 63, so every position lies in +-126 and +128 makes it an unsigned byte, except (1,1), a sum of four: 0 … 252.
template <int WIDTH>
static inline void transform_patch(const uint8_t* d, int64_t row, int64_t pixel, uint8_t* v, int64_t v_stride) {
  typedef uint8_t u8 __attribute__((vector_size(WIDTH), aligned(1), may_alias));
  u8 x[4][4];
  for (int i = 0; i < 4; ++i) {
    const uint8_t* r = d + i * row;
    const u8 d0 = *(const u8*)r, d1 = *(const u8*)(r + pixel), d2 = *(const u8*)(r + 2 * pixel), d3 = *(const u8*)(r + 3 * pixel);
    x[i][0] = d0 - d2, x[i][1] = d1 + d2, x[i][2] = d2 - d1, x[i][3] = d1 - d3;
  }
  for (int j = 0; j < 4; ++j) {
    const u8 rows[4] = {(u8)(x[0][j] - x[2][j]), (u8)(x[1][j] + x[2][j]), (u8)(x[2][j] - x[1][j]), (u8)(x[1][j] - x[3][j])};
    for (int i = 0; i < 4; ++i) *(u8*)(v + (i * 4 + j) * v_stride) = (i == 1 && j == 1) ? rows[i] : (u8)(rows[i] ^ (uint8_t)128);
  }
}

static void winograd_input(const uint8_t* d, int64_t row, int64_t pixel, int channels, uint8_t* v, int64_t v_stride) {
  int c = 0;
  for (; c + 64 <= channels; c += 64) transform_patch<64>(d + c, row, pixel, v + c, v_stride);
  for (; c + 16 <= channels; c += 16) transform_patch<16>(d + c, row, pixel, v + c, v_stride);
  for (; c < channels; c += 4) transform_patch<4>(d + c, row, pixel, v + c, v_stride);  // channels is a multiple of 4
}

// Y = A^T M A with A^T = [1 1 1 0; 0 1 -1 -1]. |M| <= 255 * 9 * C and sums of 9 of them stay below 2^31 for C < 100,000.
static void winograd_output(const int32_t* m, int tiles, int width, int32_t* y) {
  const int64_t step = (int64_t)tiles * width;
  for (int t = 0; t < tiles; ++t) {
    for (int c = 0; c < width; c += LANES) {
      const int32_t* from = m + t * width + c;
      ints rows[2][4];
      for (int j = 0; j < 4; ++j) {
        const ints m0 = *(const ints*)(from + j * step), m1 = *(const ints*)(from + (4 + j) * step);
        const ints m2 = *(const ints*)(from + (8 + j) * step), m3 = *(const ints*)(from + (12 + j) * step);
        rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
      }
      for (int i = 0; i < 2; ++i) {
        *(ints*)(y + (t * 4 + i * 2) * width + c) = rows[i][0] + rows[i][1] + rows[i][2];
        *(ints*)(y + (t * 4 + i * 2 + 1) * width + c) = rows[i][1] - rows[i][2] - rows[i][3];
      }
    }
  }
}

static inline uint32_t pixel_code(float x) {
  float y = x * 255.0f;
  y = y > 0.0f ? y : 0.0f;
  y = y < 255.0f ? y : 255.0f;
  const float shifted = y + kRound;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  return bits & 255u;
}

static void image_row(const float* const* planes, int channels, int width, uint8_t* out, int stride) {
  if (channels == 3 && stride == 4) {
    const float *r = planes[0], *g = planes[1], *b = planes[2];
    for (int x = 0; x < width; ++x) {
      const uint32_t value = pixel_code(r[x]) | pixel_code(g[x]) << 8 | pixel_code(b[x]) << 16;
      out[4 * x] = (uint8_t)value, out[4 * x + 1] = (uint8_t)(value >> 8), out[4 * x + 2] = (uint8_t)(value >> 16);
    }
    return;
  }
  for (int c = 0; c < channels; ++c)
    for (int x = 0; x < width; ++x) out[(int64_t)x * stride + c] = (uint8_t)pixel_code(planes[c][x]);
}

static float quantize_row(const float* x, int64_t k, int code_max, uint8_t* out) {
  floats top = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    const floats v = *(const floats*)(x + i);
    const floats magnitude = v < 0.0f ? -v : v;
    top = magnitude > top ? magnitude : top;
  }
  float absmax = 1e-5f;  // the smallest, so that an all-zero row has a scale
  for (int l = 0; l < LANES; ++l) absmax = top[l] > absmax ? top[l] : absmax;
  for (; i < k; ++i) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  const float inverse = (float)code_max / absmax;
  // |x * inverse| <= code_max * (1 + 2^-22): rounds to at most code_max, so only the lower clamp is implied too.
  const ints low = ints{} - code_max - 1, high = ints{} + code_max;
  for (i = 0; i < k; i += LANES) {
    const int n = k - i < LANES ? (int)(k - i) : LANES;
    const floats v = n == LANES ? *(const floats*)(x + i) : load_part<floats>(x + i, n * 4);
    ints q = ((ints)(v * inverse + kRound) & 0x1ff);
    q = (q << 23) >> 23;  // sign of the low 9 bits
    q = q < low ? low : q;
    q = q > high ? high : q;
    const bytes b = ints_to_bytes((q + 128) & 255);
    if (n == LANES) *(bytes*)(out + i) = b;
    else __builtin_memcpy(out + i, &b, n);
  }
  return absmax / (float)code_max;
}

static void max_row(const uint8_t* in, int n, uint8_t* inout) {
  for (int i = 0; i < n; ++i) inout[i] = in[i] > inout[i] ? in[i] : inout[i];
}

static void add_row(const uint8_t* in, int n, int32_t* inout) {
  for (int i = 0; i < n; ++i) inout[i] += in[i];
}

// What the machine can do at most, for benchmarks: the multiply-adds of `dot` on registers alone, and reading memory.
static int64_t peak_multiply_adds(int64_t iterations, const uint8_t* data) {
  constexpr int P = PIXELS, J = VECTORS;
  vec acc[P][J];
  vec b[J];
  const vec x = load_weights(data);
  EACH_VECTOR(b[j] = load_weights(data + j * LANES * 4);)
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = load_ints((const int32_t*)data + p * J + j);))  // all different: nothing to merge
  for (int64_t i = 0; i < iterations; ++i) {
    EACH_PIXEL(EACH_VECTOR(acc[p][j] = dot<Weights::kSmall>(acc[p][j], x, b[j]);))
  }
  int32_t out[LANES], keep = 0;
  EACH_PIXEL(EACH_VECTOR(store_ints(out, acc[p][j]); keep ^= out[0];))
  volatile int32_t sink = keep;
  (void)sink;
  return iterations * P * J * LANES * 4;
}

static void read_memory(const uint8_t* data, int64_t bytes) {
  ints sum[4] = {};
  for (int64_t i = 0; i + (int64_t)sizeof(sum) <= bytes; i += sizeof(sum))
    for (int k = 0; k < 4; ++k) sum[k] ^= ((const ints*)(data + i))[k];
  volatile int32_t sink = (sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0];
  (void)sink;
}

static const Kernels table = {ISA_NAME, LANES, VECTORS, PIXELS, multiply, finish, winograd_input, winograd_output,
                              image_row, quantize_row, max_row, add_row, peak_multiply_adds, read_memory};
