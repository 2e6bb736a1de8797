// Part of body.h: linear layers whose activations were quantized per row.

// One vector of channels, of which n are real, of row p.
template <Then THEN>
static inline void finish_row(const LinearOutput& r, int p, int channel, int n, vec acc) {
  float* const out = r.out + p * r.stride + channel;
  const floats gain = *(const floats*)(r.gain + channel) * r.row_scale[p];
  floats y = multiply_add(__builtin_convertvector((ints)acc, floats), gain, *(const floats*)(r.bias + channel));
  if constexpr (THEN == Then::kGelu) y = gelu(y);
  if constexpr (THEN == Then::kAdd) y = y + (n == LANES ? *(const floats*)out : load_part<floats>(out, n * 4));
  store_part<floats>(out, y, n * 4);
}

template <Then THEN>
static void rows_then(Weights weights, const Tile& t, const LinearOutput& r) {
  if (weights == Weights::kTwoBit && t.channels == VECTORS * LANES && t.count > 1) {  // finished in registers, without a branch
    const auto finish_all = [&](int p, int j, vec acc) { finish_row<THEN>(r, p, j * LANES, LANES, acc); };
    return with_count<PIXELS, 2>(t.count, [&]<int P>(Constant<P>) { tile_kernel<Weights::kTwoBit, P, VECTORS>(t, finish_all); });
  }
  alignas(64) int32_t acc[PIXELS * VECTORS * LANES];
  multiply(weights, t, acc);
  const int vectors = (t.channels + LANES - 1) / LANES;
  for (int p = 0; p < t.count; ++p)
    for (int j = 0; j < vectors; ++j) {
      const int n = t.channels - j * LANES < LANES ? t.channels - j * LANES : LANES;
      finish_row<THEN>(r, p, j * LANES, n, load_ints(acc + (p * vectors + j) * LANES));
    }
}

// Block by block of channels.
static void multiply_rows(Weights weights, const Tile& t, const LinearOutput& r) {
  constexpr int kBlock = VECTORS * LANES;
  Tile block = t;
  LinearOutput to = r;
  for (int left = t.channels; left > 0; left -= kBlock) {
    block.channels = left < kBlock ? left : kBlock;
    switch (r.then) {
      case Then::kStore: rows_then<Then::kStore>(weights, block, to); break;
      case Then::kGelu: rows_then<Then::kGelu>(weights, block, to); break;
      case Then::kAdd: rows_then<Then::kAdd>(weights, block, to); break;
    }
    block.weights += (int64_t)t.runs * t.groups * kBlock * 4, block.init += kBlock;
    to.gain += kBlock, to.bias += kBlock, to.out += kBlock;
  }
}
