// Part of body.h: the float arithmetic of a transformer encoder between its integer products.

// The sum of value(vector) over n floats, and of what remains of them at the end, padded with `beyond`, in an order that depends
// on n alone; four chains of additions, because one waits for the result of each.
template <typename Value>
static inline float sum_over(const float* x, int n, float beyond, const Value& value) {
  floats sums[4] = {};
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + value(*(const floats*)(x + i + k * LANES));
  for (; i + LANES <= n; i += LANES) sums[0] = sums[0] + value(*(const floats*)(x + i));
  if (i < n) {
    float rest[LANES];
    for (int k = 0; k < LANES; ++k) rest[k] = i + k < n ? x[i + k] : beyond;
    sums[1] = sums[1] + value(*(const floats*)rest);
  }
  const floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum_of(sum);
}

static void layer_norm(const float* x, int n, const float* weight, const float* bias, float epsilon, float* out) {
  const float mean = sum_over(x, n, 0.0f, [=](floats v) { return v; }) / (float)n;
  const float square = sum_over(x, n, mean, [=](floats v) { return (v - mean) * (v - mean); });
  const float inverse = 1.0f / __builtin_sqrtf(square / (float)n + epsilon);
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    *(floats*)(out + i) = multiply_add((*(const floats*)(x + i) - mean) * inverse, *(const floats*)(weight + i), *(const floats*)(bias + i));
  for (; i < n; ++i) out[i] = __builtin_fmaf((x[i] - mean) * inverse, weight[i], bias[i]);
}

// out[p][j] = gain[p] * sum over i of a[p][i] * b[i][j], P rows and J vectors of columns in registers. To subtract 0 changes no
// number, so that it is one load; to add it makes +0 of -0, and takes an addition.
template <int P, int J>
static inline void float_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int count, const float* gain, float* out,
                              int64_t out_stride) {
  floats acc[P][J];
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = floats{};))
  for (int i = 0; i < count; ++i) {
    floats row[J];
    EACH_VECTOR(row[j] = *(const floats*)(b + i * b_stride + j * LANES);)
    EACH_PIXEL(const floats x = a[p * a_stride + i] - floats{}; EACH_VECTOR(acc[p][j] = multiply_add(row[j], x, acc[p][j]);))
  }
  EACH_PIXEL(EACH_VECTOR(*(floats*)(out + p * out_stride + j * LANES) = acc[p][j] * gain[p];))
}

// The product of a (rows x count) and b (count x columns), its rows times `gain`; columns is a multiple of LANES.
static void float_product(const float* a, int64_t a_stride, int rows, const float* b, int64_t b_stride, int count, int columns,
                          const float* gain, float* out, int64_t out_stride) {
  for (int p = 0; p < rows; p += PIXELS)
    with_count<PIXELS>(rows - p < PIXELS ? rows - p : PIXELS, [&]<int P>(Constant<P>) {
      const float* from = a + p * a_stride;
      float* to = out + p * out_stride;
      int j = 0;
      for (; j + VECTORS * LANES <= columns; j += VECTORS * LANES) float_tile<P, VECTORS>(from, a_stride, b + j, b_stride, count, gain + p, to + j, out_stride);
      for (; j < columns; j += LANES) float_tile<P, 1>(from, a_stride, b + j, b_stride, count, gain + p, to + j, out_stride);
    });
}

static inline float dot_product(const float* a, const float* b, int n) {  // n: a multiple of LANES
  floats sum = {};
  for (int i = 0; i < n; i += LANES) sum = multiply_add(*(const floats*)(a + i), *(const floats*)(b + i), sum);
  return sum_of(sum);
}

// row: scores in units of log(2) to 2^(score - largest); returns 1 / their sum. `hidden`: lanes of the last vector beyond the tokens.
static inline float softmax(floats* row, int vectors, ints hidden) {
  row[vectors - 1] = hidden ? floats{} - 1e30f : row[vectors - 1];
  floats tops = row[0], sums = {};
  for (int i = 1; i < vectors; ++i) tops = larger(tops, row[i]);
  const float top = largest_of(tops);
  for (int i = 0; i < vectors; ++i) {
    const floats e = power_of_two(row[i] - top);
    row[i] = e;
    sums = sums + e;
  }
  return 1.0f / sum_of(sums);
}

static void attention(const Attention& t, int first, int queries, float* scores, float* out, int64_t out_stride) {
  const int vectors = (t.tokens + LANES - 1) / LANES, padded = vectors * LANES, over = t.tokens % LANES;
  // A class token makes the tokens one more than a multiple of the lanes: a vector of columns for it would be mostly padding.
  const int columns = over * 4 <= LANES ? t.tokens - over : padded;
  const float* const q = t.q + first * t.stride;
  const float in_powers_of_two = t.scale * 1.44269504f;
  float gain[kMaxQueries];
  for (float& g : gain) g = in_powers_of_two;
  float_product(q, t.stride, queries, t.keys, padded, t.dim, columns, gain, scores, padded);
  for (int k = columns; k < t.tokens; ++k)
    for (int p = 0; p < queries; ++p) scores[p * padded + k] = dot_product(q + p * t.stride, t.k + k * t.stride, t.dim) * in_powers_of_two;
  ints hidden;
  for (int l = 0; l < LANES; ++l) hidden[l] = padded - LANES + l < t.tokens ? 0 : -1;
  for (int p = 0; p < queries; ++p) gain[p] = softmax((floats*)(scores + p * padded), vectors, hidden);
  float_product(scores, padded, queries, t.v, t.stride, t.tokens, t.dim, gain, out, out_stride);
}

typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define shuffle(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has the other only since 12
typedef int32_t four_ints __attribute__((vector_size(16)));
#define shuffle(a, b, ...) __builtin_shuffle(a, b, four_ints{__VA_ARGS__})
#endif

// keys[d][t] = k[t][d], by squares of 4 x 4; columns beyond the tokens are zeros.
static void transpose_keys(const float* k, int64_t stride, int tokens, int dim, float* keys) {
  const int padded = (tokens + LANES - 1) / LANES * LANES;
  int t = 0;
  for (; t + 4 <= tokens; t += 4, k += 4 * stride)
    for (int d = 0; d < dim; d += 4) {
      four_floats row[4];
      for (int i = 0; i < 4; ++i) row[i] = *(const four_floats*)(k + i * stride + d);
      const four_floats a = shuffle(row[0], row[1], 0, 4, 1, 5), b = shuffle(row[2], row[3], 0, 4, 1, 5);
      const four_floats c = shuffle(row[0], row[1], 2, 6, 3, 7), e = shuffle(row[2], row[3], 2, 6, 3, 7);
      const four_floats column[4] = {shuffle(a, b, 0, 1, 4, 5), shuffle(a, b, 2, 3, 6, 7),
                                     shuffle(c, e, 0, 1, 4, 5), shuffle(c, e, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) *(four_floats*)(keys + (int64_t)(d + i) * padded + t) = column[i];
    }
  for (; t < padded; ++t, k += stride)
    for (int d = 0; d < dim; ++d) keys[(int64_t)d * padded + t] = t < tokens ? k[d] : 0.0f;
}
#undef shuffle
