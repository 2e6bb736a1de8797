// Part of body.h: the float arithmetic of a transformer encoder between its integer products.

// exp(x) for x in [-87, 0], exp(-87) below; relative error below 2e-7. x = n * log(2) + r, a polynomial of
// degree 6 for exp(r) (the coefficients of Cephes' expf, S. Moshier), and n added to the exponent's bits.
static inline floats exponential(floats x) {
  x = x > -87.0f ? x : floats{} - 87.0f;
  const floats shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return (floats)((ints)y + (__builtin_convertvector(n, ints) << 23));
}

// x * (1 + erf(x / sqrt(2))) / 2, with erf by 7.1.26 of M. Abramowitz, I. Stegun, "Handbook of Mathematical Functions" (1964),
// whose absolute error is below 1.5e-7.
static inline floats gelu_of(floats x) {
  const floats z = (x < 0.0f ? -x : x) * 0.70710678f;
  const floats t = 1.0f / (z * 0.3275911f + 1.0f);
  floats y = t * 1.061405429f - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  const floats tail = y * t * exponential(-z * z);  // 1 - erf(|x| / sqrt(2))
  return x * 0.5f * (x < 0.0f ? tail : 2.0f - tail);
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

static inline float sum_of(floats v) {
  float sum = 0.0f;
  for (int l = 0; l < LANES; ++l) sum += v[l];
  return sum;
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
    squares = squares + d * d;
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
    EACH_PIXEL(const float x = a[p * a_stride + i]; EACH_VECTOR(acc[p][j] = acc[p][j] + row[j] * x;))
  }
  EACH_PIXEL(EACH_VECTOR(*(floats*)(out + p * out_stride + j * LANES) = acc[p][j];))
}

// The product of a (rows x count) and b (count x columns); columns is a multiple of LANES.
static void float_product(const float* a, int64_t a_stride, int rows, const float* b, int64_t b_stride, int count, int columns, float* out,
                          int64_t out_stride) {
  int p = 0;
  const auto column_tiles = [&]<int P>(Constant<P>) {
    int j = 0;
    for (; j + VECTORS * LANES <= columns; j += VECTORS * LANES)
      float_tile<P, VECTORS>(a + p * a_stride, a_stride, b + j, b_stride, count, out + p * out_stride + j, out_stride);
    for (; j < columns; j += LANES)
      float_tile<P, 1>(a + p * a_stride, a_stride, b + j, b_stride, count, out + p * out_stride + j, out_stride);
  };
  for (; p + 4 <= rows; p += 4) column_tiles(Constant<4>());
  for (; p < rows; ++p) column_tiles(Constant<1>());
}

static void attention(const Attention& t, int first, int queries, float* scores, float* out, int64_t out_stride) {
  const int padded = (t.tokens + LANES - 1) / LANES * LANES;
  float_product(t.q + first * t.stride, t.stride, queries, t.keys, padded, t.dim, padded, scores, padded);
  for (int p = 0; p < queries; ++p) {
    float* row = scores + (int64_t)p * padded;
    for (int i = t.tokens; i < padded; ++i) row[i] = -1e30f;
    floats tops = *(const floats*)row;
    for (int i = LANES; i < padded; i += LANES) {
      const floats v = *(const floats*)(row + i);
      tops = v > tops ? v : tops;
    }
    float top = tops[0];
    for (int l = 1; l < LANES; ++l) top = tops[l] > top ? tops[l] : top;
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
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < dim; ++d) keys[(int64_t)d * padded + t] = k[t * stride + d];
  for (int d = 0; d < dim; ++d)
    for (int t = tokens; t < padded; ++t) keys[(int64_t)d * padded + t] = 0.0f;
}
