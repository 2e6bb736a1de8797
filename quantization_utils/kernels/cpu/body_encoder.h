// Part of body.h: the float arithmetic of a transformer encoder between its integer products.

// Horner's scheme, the highest power's coefficient first.
template <typename... Rest>
static inline floats polynomial(floats x, float highest, Rest... rest) {
  floats y = floats{} + highest;
  ((y = multiply_add(y, x, floats{} + rest)), ...);
  return y;
}

// exp(x) for x in [-87, 0], exp(-87) below; relative error below 2e-7. x = n * log(2) + r, a polynomial of
// degree 6 for exp(r) (the coefficients of Cephes' expf, S. Moshier), and n added to the exponent's bits.
static inline floats exponential(floats x) {
  x = larger(x, floats{} - 87.0f);
  const floats shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const floats y = multiply_add(polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                           5.0000001201e-1f), r * r, r + 1.0f);
  return (floats)((ints)y + (__builtin_convertvector(n, ints) << 23));
}

// x * (1 + erf(x / sqrt(2))) / 2, with erf(z) = z * P(z^2) / Q(z^2) fitted to |z| <= 3.9, where 1 - erf is below 4e-8: its error
// is below 5e-7 everywhere.
static inline floats gelu_of(floats x) {
  const floats z = smaller(larger(x * 0.70710678f, floats{} - 3.9f), floats{} + 3.9f);
  const floats t = z * z;
  const floats p = polynomial(t, -1.497414697e-6f, 2.633031481e-4f, 1.046049956e-2f, 7.329031436e-2f, 3.698464242e-1f, 1.128381515f);
  const floats q = polynomial(t, 2.454245028e-3f, 2.868578647e-2f, 1.853339642e-1f, 6.611085427e-1f, 1.0f);
  return x * 0.5f * multiply_add(z * p, reciprocal(q), floats{} + 1.0f);
}

static void gelu(int n, float* inout) {
  for (int i = 0; i < n; i += LANES) {
    if (n - i >= LANES) {
      *(floats*)(inout + i) = gelu_of(*(const floats*)(inout + i));
    } else {
      const floats y = gelu_of(load_part<floats>(inout + i, (n - i) * 4));
      __builtin_memcpy(inout + i, &y, (n - i) * 4);
    }
  }
}

static void add_floats(const float* in, int n, float* inout) {
  for (int i = 0; i < n; ++i) inout[i] += in[i];
}

static void layer_norm(const float* x, int n, const float* weight, const float* bias, float epsilon, float* out) {
  floats sums = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) sums = sums + *(const floats*)(x + i);
  float sum = sum_of(sums);
  for (; i < n; ++i) sum += x[i];
  const float mean = sum / (float)n;
  floats squares = {};
  for (i = 0; i + LANES <= n; i += LANES) {
    const floats d = *(const floats*)(x + i) - mean;
    squares = multiply_add(d, d, squares);
  }
  float square = sum_of(squares);
  for (; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / __builtin_sqrtf(square / (float)n + epsilon);
  for (i = 0; i + LANES <= n; i += LANES)
    *(floats*)(out + i) = (*(const floats*)(x + i) - mean) * inverse * *(const floats*)(weight + i) + *(const floats*)(bias + i);
  for (; i < n; ++i) out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

// out[p][j] = sum over i of a[p][i] * b[i][j], P rows and J vectors of columns in registers.
template <int P, int J>
static inline void float_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int count, float* out, int64_t out_stride) {
  floats acc[P][J];
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = floats{};))
  for (int i = 0; i < count; ++i) {
    floats row[J];
    EACH_VECTOR(row[j] = *(const floats*)(b + i * b_stride + j * LANES);)
    EACH_PIXEL(const floats x = floats{} + a[p * a_stride + i]; EACH_VECTOR(acc[p][j] = multiply_add(row[j], x, acc[p][j]);))
  }
  EACH_PIXEL(EACH_VECTOR(*(floats*)(out + p * out_stride + j * LANES) = acc[p][j];))
}

// The product of a (rows x count) and b (count x columns); columns is a multiple of LANES.
static void float_product(const float* a, int64_t a_stride, int rows, const float* b, int64_t b_stride, int count, int columns, float* out,
                          int64_t out_stride) {
  int p = 0;
  const auto tiles = [&]<int P>(Constant<P>) {
    if constexpr (P > 0) for (; p + P <= rows; p += P) {
      const float* from = a + p * a_stride;
      float* to = out + p * out_stride;
      int j = 0;
      for (; j + VECTORS * LANES <= columns; j += VECTORS * LANES) float_tile<P, VECTORS>(from, a_stride, b + j, b_stride, count, to + j, out_stride);
      for (; j < columns; j += LANES) float_tile<P, 1>(from, a_stride, b + j, b_stride, count, to + j, out_stride);
    }
  };
  tiles(Constant<PIXELS>());  // what remains is one smaller tile
  EACH(i, PIXELS, 1, tiles(Constant<PIXELS - i>());)
  EACH(i, PIXELS, 2, tiles(Constant<PIXELS - i>());)
  EACH(i, PIXELS, 3, tiles(Constant<PIXELS - i>());)
  EACH(i, PIXELS, 4, tiles(Constant<PIXELS - i>());)
  EACH(i, PIXELS, 5, tiles(Constant<PIXELS - i>());)
}

static void attention(const Attention& t, int first, int queries, float* scores, float* out, int64_t out_stride) {
  const int padded = (t.tokens + LANES - 1) / LANES * LANES;
  float_product(t.q + first * t.stride, t.stride, queries, t.keys, padded, t.dim, padded, scores, padded);
  for (int p = 0; p < queries; ++p) {
    float* row = scores + (int64_t)p * padded;
    for (int i = t.tokens; i < padded; ++i) row[i] = -1e30f;
    floats tops = *(const floats*)row;
    for (int i = LANES; i < padded; i += LANES) tops = larger(tops, *(const floats*)(row + i));
    const float top = largest_of(tops);
    floats sums = {};
    for (int i = 0; i < padded; i += LANES) {
      const floats e = exponential((*(const floats*)(row + i) - top) * t.scale);
      *(floats*)(row + i) = e;
      sums = sums + e;
    }
    for (int i = t.tokens; i < padded; ++i) row[i] = 0.0f;  // exp(-87) times their number is nothing beside the largest's 1
    const float inverse = 1.0f / sum_of(sums);
    for (int i = 0; i < padded; i += LANES) *(floats*)(row + i) = *(const floats*)(row + i) * inverse;
  }
  float_product(scores, padded, queries, t.v, t.stride, t.tokens, t.dim, out, out_stride);
}

static void transpose_keys(const float* k, int64_t stride, int tokens, int dim, float* keys) {
  const int padded = (tokens + LANES - 1) / LANES * LANES;
  int t = 0;
  for (; t + 4 <= tokens; t += 4, k += 4 * stride)
    for (int d = 0; d < dim; ++d) {
      const float four[4] = {k[d], k[stride + d], k[2 * stride + d], k[3 * stride + d]};
      __builtin_memcpy(keys + (int64_t)d * padded + t, four, sizeof four);
    }
  for (; t < padded; ++t, k += stride)
    for (int d = 0; d < dim; ++d) keys[(int64_t)d * padded + t] = t < tokens ? k[d] : 0.0f;
}
