// Part of body.h: images, activations quantized per row, pools, and what the machine can do at most.

// round(x * 255), clamped to 0 ... 255.
static inline ints pixel_codes(floats x) { return (ints)(smaller(larger(x * 255.0f, floats{}), floats{} + 255.0f) + kRound) & 255; }

static void image_row(const float* const* planes, int channels, int width, uint8_t* out, int stride) {
  for (int x = 0; x < width; x += LANES) {
    const int n = width - x < LANES ? width - x : LANES;
    for (int c = 0; c < channels; ++c) {
      const float* from = planes[c] + x;
      const ints codes = pixel_codes(n == LANES ? *(const floats*)from : load_part<floats>(from, n * 4));
      uint8_t* to = out + (int64_t)x * stride + c;
      for (int i = 0; i < n; ++i) to[(int64_t)i * stride] = (uint8_t)codes[i];
    }
  }
}

static float quantize_row(const float* x, int64_t k, int code_max, uint8_t* out) {
  ints top = {};  // of magnitudes, taken as integers: in the same order, and what is not a number is beyond infinity
  const auto see = [&](floats v) {
    const ints magnitude = (ints)v & 0x7FFFFFFF;
    top = top > magnitude ? top : magnitude;
  };
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) see(*(const floats*)(x + i));
  if (i < k) see(load_part<floats>(x + i, (int)(k - i) * 4));
  const float infinity = __builtin_inff();
  const ints most = (ints)(floats{} + infinity);
  const float largest = largest_of((floats)(top < most ? top : most));
  const float absmax = largest > 1e-5f ? largest : 1e-5f;  // the smallest, so that an all-zero row has a scale
  const float inverse = (float)code_max / absmax;
  // |x * inverse| <= code_max * (1 + 2^-22), which rounds to at most code_max: nothing to clamp. kRound's last bits are 0.
  const auto codes = [=](floats v) { return ints_to_bytes((ints)(v * inverse + (kRound + 128.0f))); };
  for (i = 0; i + LANES <= k; i += LANES) *(bytes*)(out + i) = codes(*(const floats*)(x + i));
  if (i < k) store_part<bytes>(out + i, codes(load_part<floats>(x + i, (int)(k - i) * 4)), (int)(k - i));
  return absmax < infinity ? absmax / (float)code_max : __builtin_nanf("");
}

static void max_row(const uint8_t* in, int n, uint8_t* inout) {
  for (int i = 0; i < n; ++i) inout[i] = in[i] > inout[i] ? in[i] : inout[i];
}

static void add_row(const uint8_t* in, int n, int32_t* inout) {
  for (int i = 0; i < n; ++i) inout[i] += in[i];
}

// What the machine can do at most, for benchmarks: the multiply-adds of `dot` on registers alone, and reading memory. On AVX2, where
// sums in pairs of ternary weights take less, that is the limit of 8-bit weights of small magnitude.
static int64_t peak_multiply_adds(int64_t iterations, const uint8_t* data) {
  constexpr int P = PIXELS, J = VECTORS;
  vec acc[P][J];
  vec b[J];
  EACH_VECTOR(b[j] = load_weights(data + j * LANES * 4);)
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = load_ints((const int32_t*)data + p * J + j);))  // all different: nothing to merge
  const uint8_t* volatile from = data;  // read again and again: a product that stays the same would be taken once
  for (int64_t i = 0; i < iterations; ++i) {
    const uint8_t* const a = from;
    EACH_PIXEL(const vec x = broadcast(a + 4 * p); EACH_VECTOR(acc[p][j] = dot<Weights::kSmall>(acc[p][j], x, b[j]);))
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
