// Part of body.h: products with 2-bit weights whose pairs are added in 16 bits, as many as fit (kernels.h), before they are
// widened: two instructions for LANES * 4 multiply-adds instead of three. P pixels x J vectors of channels in registers.
template <Weights W, int P, int J, typename Take>
  requires(W == Weights::kTwoBit)
static inline void tile_kernel(const Tile& t, const Take& take) {
  vec acc[P][J];
  EACH_PIXEL(EACH_VECTOR(acc[p][j] = load_ints(t.init + j * LANES);))
  const uint8_t* w = t.weights;
  const uint8_t* a[P];
  EACH_PIXEL(a[p] = t.pixels[p];)
  for (int run = 0; run < t.runs; ++run) {
    for (int left = t.groups; left > 0; left -= kGroupsInSums) {
      vec sums[P][J];
      EACH_PIXEL(EACH_VECTOR(sums[p][j] = vec{};))
      for (int g = left < kGroupsInSums ? left : kGroupsInSums; g > 0; --g) {
        vec low[J], high[J];
#define TERNARY_GROUP(S, b) EACH_PIXEL(add_pairs(sums[p], a[p] + 4 * (S), b);)
#define TERNARY_GROUPS(S)                                                       \
  EACH_VECTOR(two_groups<S>(load_weights(w + j * LANES * 4), low[j], high[j]);) \
  TERNARY_GROUP(S, low) TERNARY_GROUP(S + 1, high)
        TERNARY_GROUPS(0) TERNARY_GROUPS(2)
#undef TERNARY_GROUPS
#undef TERNARY_GROUP
        EACH_VECTOR(__builtin_prefetch(w + j * LANES * 4 + (P == 1 ? kPrefetchBytes : kTilePrefetchBytes));)
        EACH_PIXEL(a[p] += 16;)
        w += J * LANES * 4;
      }
      EACH_PIXEL(EACH_VECTOR(acc[p][j] = add_sums(acc[p][j], sums[p][j], 64);))
    }
    EACH_PIXEL(a[p] += t.run_stride - t.groups * 16;)
  }
  EACH_PIXEL(EACH_VECTOR(take(p, j, acc[p][j]);))
}
