// Part of body.h: from accumulators to a node's output.

enum class Residual { kNone, kBytes, kFloats };

// What a whole tile has in common, copied: behind a reference it would be loaded again after every byte that is stored.
struct Finish {
  explicit Finish(const Epilogue& e)
      : residual_gain(floats{} + e.residual_gain), unit(floats{} + e.unit), top(ints{} + kRoundBits + e.out_max), relu(e.relu) {}
  floats residual_gain, unit;
  ints top;
  bool relu;
};

// Of the first n channels of a vector, before rounding.
template <Residual R>
static inline floats finished(const Finish& f, const void* residual, int n, ints acc, floats gain, floats bias) {
  floats y = multiply_add(__builtin_convertvector(acc, floats), gain, bias);
  if constexpr (R == Residual::kFloats) {
    y = multiply_add(n == LANES ? *(const floats*)residual : load_part<floats>(residual, n * 4), f.residual_gain, y);
  } else if constexpr (R == Residual::kBytes) {
    y = multiply_add(bytes_to_floats(n == LANES ? *(const bytes*)residual : load_part<bytes>(residual, n)), f.residual_gain, y);
  }
  return y;
}

// One vector of channels of one pixel, of which n are real, with that vector's residual.
template <Residual R, bool BYTES>
static inline void finish_vector(const Finish& f, void* out, const void* residual, int n, ints acc, floats gain, floats bias) {
  floats y = finished<R>(f, residual, n, acc, gain, bias);
  if constexpr (BYTES) {  // the clamp is the ReLU
    const ints zero = ints{} + kRoundBits;
    ints q = (ints)(y + kRound);
    q = q > zero ? q : zero;
    q = q < f.top ? q : f.top;
    store_part<bytes>(out, ints_to_bytes(q), n);
  } else {
    if (f.relu) y = larger(y, floats{});
    store_part<floats>(out, y, n * 4);
  }
}

#ifdef PACKED
// So many whole vectors of channels of all pixels, as finish_vector finishes one, bit for bit: rounding keeps order, so a limit that is
// an integer can come before it, and packing clamps at 0. (`smaller` takes its second argument where that is not a number, and
// what is not a number is rounded to the least integer.)
template <Residual R>
static inline void finish_packed(const Finish& f, const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int vectors, int64_t channel) {
  const floats top = floats{} + (float)e.out_max;
  typedef uint8_t packed __attribute__((vector_size(LANES * PACKED), aligned(1), may_alias));
  floats gain[PACKED], bias[PACKED];
  EACH_PACKED(gain[q] = *(const floats*)(e.gain + channel + q * LANES) * f.unit; bias[q] = *(const floats*)(e.bias + channel + q * LANES);)
  for (int p = 0; p < pixels; ++p, acc += vectors * LANES) {
    ints codes[PACKED];
    EACH_PACKED(const void* const residual = R == Residual::kNone ? nullptr : (const char*)o.residual[p] + (channel + q * LANES) * (R == Residual::kBytes ? 1 : 4);
                 codes[q] = rounded(smaller(top, finished<R>(f, residual, LANES, *(const ints*)(acc + q * LANES), gain[q], bias[q])));)
    *(packed*)((char*)o.out[p] + channel) = (packed)pack_bytes(codes);
  }
}
#endif

template <Residual R, bool BYTES>
static void finish_kind(const Epilogue& e, const Output& o, const int32_t* acc, int pixels, int channels) {
  const int vectors = (channels + LANES - 1) / LANES;
  const Finish f(e);
  int j = 0;
#ifdef PACKED
  if constexpr (BYTES)
    for (; (j + PACKED) * LANES <= channels; j += PACKED) finish_packed<R>(f, e, o, acc + j * LANES, pixels, vectors, j * LANES);
#endif
  for (; j < vectors; ++j) {
    const int n = channels - j * LANES < LANES ? channels - j * LANES : LANES;
    const floats gain = *(const floats*)(e.gain + j * LANES) * f.unit, bias = *(const floats*)(e.bias + j * LANES);
    for (int p = 0; p < pixels; ++p) {
      void* const out = (char*)o.out[p] + j * LANES * (BYTES ? 1 : 4);
      const void* const residual = R == Residual::kNone ? nullptr : (const char*)o.residual[p] + j * LANES * (R == Residual::kBytes ? 1 : 4);
      const ints sum = *(const ints*)(acc + (p * vectors + j) * LANES);
      finish_vector<R, BYTES>(f, out, residual, n, sum, gain, bias);
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
  by_kind(e, o, [&](auto residual, auto to_bytes) { finish_kind<residual.value, to_bytes.value>(e, o, acc, pixels, channels); });
}
