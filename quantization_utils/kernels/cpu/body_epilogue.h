// Part of body.h: from accumulators to a node's output.

// Adding and removing 1.5 * 2^23 rounds a float of magnitude < 2^22 to the nearest integer, ties to even, as rint does; the
// low bits of the sum are that integer. Values are clamped first (the bounds are integers, so the order does not matter).
static constexpr float kRound = 12582912.0f;

enum class Residual { kNone, kBytes, kFloats };

// One vector of channels of one pixel, of which n are real; `at` is its first channel within the pixel.
template <Residual R, bool BYTES>
static inline void finish_vector(const Epilogue& e, const Output& o, int p, int at, int n, ints acc, floats gain, floats bias) {
  floats y = __builtin_convertvector(acc >> e.shift, floats) * gain;
  y = y + bias;
  if constexpr (R == Residual::kFloats) {
    const float* from = (const float*)o.residual[p] + at;
    y = y + (n == LANES ? *(const floats*)from : load_part<floats>(from, n * 4)) * e.residual_gain;
  } else if constexpr (R == Residual::kBytes) {
    const uint8_t* from = (const uint8_t*)o.residual[p] + at;
    y = y + bytes_to_floats(n == LANES ? *(const bytes*)from : load_part<bytes>(from, n)) * e.residual_gain;
  }
  if constexpr (BYTES) {  // the clamp is the ReLU
    const floats top = floats{} + (float)e.out_max;
    y = y > 0.0f ? y : floats{};
    y = y < top ? y : top;
    const bytes q = ints_to_bytes((ints)(y + kRound) & 255);
    uint8_t* to = (uint8_t*)o.out[p] + at;
    if (n == LANES) *(bytes*)to = q;
    else __builtin_memcpy(to, &q, n);
  } else {
    if (e.relu) y = y > 0.0f ? y : floats{};
    float* to = (float*)o.out[p] + at;
    if (n == LANES) *(floats*)to = y;
    else __builtin_memcpy(to, &y, n * 4);
  }
}

template <Residual R, bool BYTES, bool ROW_SCALE>
static void finish_kind(const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int channels) {
  const int vectors = (channels + LANES - 1) / LANES;
  for (int j = 0; j < vectors; ++j) {
    const int n = channels - j * LANES < LANES ? channels - j * LANES : LANES;
    const floats gain = *(const floats*)(e.gain + j * LANES), bias = *(const floats*)(e.bias + j * LANES);
    for (int p = 0; p < pixels; ++p) {
      const ints sum = *(const ints*)(acc + (p * vectors + j) * LANES);
      if constexpr (ROW_SCALE) finish_vector<R, BYTES>(e, o, p, j * LANES, n, sum, gain * o.row_scale[p], bias);
      else finish_vector<R, BYTES>(e, o, p, j * LANES, n, sum, gain, bias);
    }
  }
}

// Calls run with the kind of residual and of output as constants.
template <typename Run>
static inline void by_kind(const Epilogue& e, const Output& o, const Run& run) {
  using None = Constant<Residual::kNone>;
  using Bytes = Constant<Residual::kBytes>;
  using Floats = Constant<Residual::kFloats>;
  const bool to_bytes = e.out_max != 0;
  if (!o.has_residual) return to_bytes ? run(None(), Constant<true>()) : run(None(), Constant<false>());
  if (o.residual_is_float) return to_bytes ? run(Floats(), Constant<true>()) : run(Floats(), Constant<false>());
  return to_bytes ? run(Bytes(), Constant<true>()) : run(Bytes(), Constant<false>());
}

static void finish(const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int channels) {
  if (o.has_row_scale) return finish_kind<Residual::kNone, false, true>(e, o, acc, pixels, channels);
  by_kind(e, o, [&](auto residual, auto to_bytes) { finish_kind<residual.value, to_bytes.value, false>(e, o, acc, pixels, channels); });
}
