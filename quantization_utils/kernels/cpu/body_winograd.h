// Part of body.h: 3x3 convolutions with fewer multiply-adds, exact in 8- or 16-bit integers; kernels.h has the algebra.

#define EACH_ROW(...) EACH(i, SIDE, 0, __VA_ARGS__) EACH(i, SIDE, 1, __VA_ARGS__) EACH(i, SIDE, 2, __VA_ARGS__) \
                      EACH(i, SIDE, 3, __VA_ARGS__) EACH(i, SIDE, 4, __VA_ARGS__) EACH(i, SIDE, 5, __VA_ARGS__)

// B^T in one dimension: 4, 5 or 6 values to as many.
template <typename u8>
static inline void transform_line(const u8 (&d)[4], u8 (&v)[4]) {
  v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}
template <typename u8>
static inline void transform_line(const u8 (&d)[5], u8 (&v)[5]) {
  v[0] = d[0] - d[2], v[1] = d[2], v[2] = d[2] - d[4], v[3] = d[1], v[4] = d[3];
}

template <typename u16>
static inline void transform_line(const u16 (&d)[6], u16 (&v)[6]) {
  const u16 even = d[2] * 4 - d[4], odd = d[1] * 4 - d[3], across = d[4] - d[2], twice = (d[3] - d[1]) * 2;
  v[0] = (d[0] - d[2]) * 4 + across, v[1] = even + odd, v[2] = even - odd;
  v[3] = across + twice, v[4] = across - twice, v[5] = d[5] - d[3] - twice * 2;
}

// V = B^T d B of WIDTH channels, in signed numbers, -128 where the position can exceed bytes.
template <int SIDE, typename Element, int WIDTH>
static inline void transform_patch(const uint8_t* d, int64_t row, int64_t pixel, uint8_t* v, int64_t v_stride) {
  typedef uint8_t u8 __attribute__((vector_size(WIDTH), aligned(1), may_alias));
  typedef Element element __attribute__((vector_size(WIDTH * sizeof(Element)), aligned(1), may_alias));
  element x[SIDE][SIDE];
  EACH_ROW(element line[SIDE]; for (int j = 0; j < SIDE; ++j) line[j] = __builtin_convertvector(*(const u8*)(d + i * row + j * pixel), element);
           transform_line(line, x[i]);)
  for (int j = 0; j < SIDE; ++j) {
    element column[SIDE], out[SIDE];
    EACH_ROW(column[i] = x[i][j];)
    transform_line(column, out);
    EACH_ROW(*(element*)(v + (i * SIDE + j) * v_stride) = winograd_has_offset(SIDE, i, j) ? (element)(out[i] ^ (Element)128) : out[i];)
  }
}

template <int SIDE, typename Element>
static void transform_channels(const uint8_t* d, int64_t row, int64_t pixel, int channels, uint8_t* v, int64_t v_stride) {
  constexpr int kSize = sizeof(Element), kMost = 64 / kSize;
  int c = 0;
  for (; c + kMost <= channels; c += kMost) transform_patch<SIDE, Element, kMost>(d + c, row, pixel, v + c * kSize, v_stride);
  for (; c + 16 <= channels; c += 16) transform_patch<SIDE, Element, 16>(d + c, row, pixel, v + c * kSize, v_stride);
  for (; c < channels; c += 4) transform_patch<SIDE, Element, 4>(d + c, row, pixel, v + c * kSize, v_stride);  // channels is a multiple of 4
}

static inline wide load_channels(const uint8_t* from, int n) { return n == LANES * 4 ? *(const wide*)from : load_part<wide>(from, n); }

// Minus kWinogradOffset times the sums of d over the channels of the pixels that kernels.h names, each as the corner that adds
// it to its output needs it: A^T's last column is -1 for stride 1.
template <int SIDE>
static inline void corner_starts(const uint8_t* d, int64_t row, int64_t pixel, int channels, int32_t* start) {
  constexpr int kStep = SIDE == 4 ? 2 : 1, kSize = SIDE == 4 ? 1 : 2, kWide = LANES * 4;
  const vec ten = (vec)(ints{} + 0x01010101 * kWinogradOffset);
  vec sums[4] = {};
  for (int c = 0; c < channels; c += kWide) {
    const int n = channels - c < kWide ? channels - c : kWide;
    wide line[2][SIDE];  // for each output row, its pixels' sum down a column
    for (int x = 0; x < SIDE; ++x)
      for (int y = 0; y < 2; ++y) {
        line[y][x] = wide{};
        for (int k = 0; k <= kSize; ++k) line[y][x] += load_channels(d + c + (y * kSize + k * kStep) * row + x * pixel, n);
      }
    for (int y = 0; y < 2; ++y)
      for (int x = 0; x < 2; ++x)
        for (int k = 0; k <= kSize; ++k) sums[y * 2 + x] = dot<Weights::kSmall>(sums[y * 2 + x], (vec)line[y][x * kSize + k * kStep], ten);
  }
  typedef int32_t four __attribute__((vector_size(16), aligned(4), may_alias));
  alignas(64) int32_t by_lane[4 * LANES], quarter[16];
  for (int i = 0; i < 4; ++i) store_ints(by_lane + i * LANES, sums[i]);
  for (int i = 0; i < 4; ++i) {
    four sum = *(const four*)(by_lane + i * LANES);
    for (int l = 4; l < LANES; l += 4) sum += *(const four*)(by_lane + i * LANES + l);
    *(four*)(quarter + i * 4) = sum;
  }
  for (int i = 0; i < 4; ++i) {
    int32_t x = quarter[i * 4];
    for (int l = 1; l < 4; ++l) x += quarter[i * 4 + l];
    start[i] = SIDE == 4 && (i == 1 || i == 2) ? x : -x;
  }
}

static void winograd_input(int side, const uint8_t* d, int64_t row, int64_t pixel, int channels, uint8_t* v, int64_t v_stride, int32_t* start) {
  if (side == 6) return transform_channels<6, uint16_t>(d, row, pixel, channels, v, v_stride);
  if (side == 4) transform_channels<4, uint8_t>(d, row, pixel, channels, v, v_stride), corner_starts<4>(d, row, pixel, channels, start);
  else transform_channels<5, uint8_t>(d, row, pixel, channels, v, v_stride), corner_starts<5>(d, row, pixel, channels, start);
}

// A^T in one dimension: SIDE values, `step` apart, to 2 or 4.
template <int SIDE>
static inline void combine(const unsigned_ints* m, int64_t step, unsigned_ints* y) {
  const unsigned_ints m0 = m[0], m1 = m[step], m2 = m[2 * step], m3 = m[3 * step];
  if constexpr (SIDE == 4) {
    y[0] = m0 + m1 + m2, y[1] = m1 - m2 - m3;
  } else if constexpr (SIDE == 5) {
    y[0] = m0 + m1 + m3, y[1] = m1 - m2 + m[4 * step];
  } else {
    const unsigned_ints m4 = m[4 * step], sum = (m1 + m2) * 4, wide_sum = m3 + m4, difference = (m1 - m2) * 4, wide_difference = (m3 - m4) * 2;
    y[0] = m0 * 6 + sum + wide_sum, y[1] = difference + wide_difference;
    y[2] = sum + wide_sum * 4, y[3] = difference + wide_difference * 4 + m[5 * step] * 24;
  }
}

// The nine numbers that a kernel's U is made of (kernels.h): column B of the three.
template <int B>
static inline void base_column(const uint8_t* w, wide (&v)[3]) {
  constexpr int kBytes = LANES * 4;
#if WINOGRAD_BYTES == 9
  for (int a = 0; a < 3; ++a) v[a] = (wide)load_weights(w + (B * 3 + a) * kBytes);
#else
  const auto low_nibble = [&](int i) { return ((wide)load_weights(w + i * kBytes) + (wide)load_weights(w + i * kBytes)) & 0x1E; };
  const auto high_nibble = [&](int i) { return (wide)((vec)((ints)load_weights(w + i * kBytes) >> 3) & (vec)(ints{} + 0x1E1E1E1E)); };
  constexpr int kEnds = B == 1 ? 3 : B / 2;
  v[0] = low_nibble(kEnds), v[2] = high_nibble(kEnds);
  if constexpr (B == 0) v[1] = low_nibble(2);
  else if constexpr (B == 2) v[1] = high_nibble(2);
  else v[1] = (wide)load_weights(w + 4 * kBytes);
#endif
}

// U of one column of positions: G in the two dimensions, by additions.
template <int SIDE, int COLUMN>
static inline void column_weights(const uint8_t* w, vec (&u)[SIDE]) {
  constexpr int kSum = SIDE == 4 ? 2 : 1, kLast = SIDE == 4 ? 3 : 2;
  wide v[3];
  if constexpr (COLUMN == kSum) {
    wide x[3], y[3];
    base_column<0>(w, x), base_column<2>(w, y);
    for (int a = 0; a < 3; ++a) v[a] = x[a] + y[a];
    if constexpr (SIDE == 4) {
      base_column<1>(w, x);
      for (int a = 0; a < 3; ++a) v[a] -= x[a];
    }
  } else {
    base_column<COLUMN == 0 ? 0 : COLUMN == kLast ? 2 : 1>(w, v);
  }
  const wide both = v[0] + v[2];
  u[0] = (vec)v[0];
  if constexpr (SIDE == 4) u[1] = (vec)v[1], u[2] = (vec)(wide)(both - v[1]), u[3] = (vec)v[2];
  else u[1] = (vec)both, u[2] = (vec)v[2], u[3] = u[4] = (vec)v[1];
}

// The products of P tiles with one vector of channels in one column of positions.
template <int SIDE, int P, int COLUMN>
static inline void column_products(const WinogradTile& t, vec (&acc)[SIDE][P]) {
  const uint8_t* w = t.weights;
  constexpr int kLast = SIDE - 1;
  EACH_ROW(if constexpr (i % kLast == 0 && COLUMN % kLast == 0) {  // a corner: of one output only, which it can set right
             EACH_PIXEL(acc[i][p] = (vec)(ints{} + t.start[p * 4 + i / kLast * 2 + COLUMN / kLast]);)
           } else {
             const vec start = winograd_has_offset(SIDE, i, COLUMN) ? load_ints(t.init) : vec{};
             EACH_PIXEL(acc[i][p] = start;)
           })
  const uint8_t* a[P];
  EACH_PIXEL(a[p] = t.input + COLUMN * t.position_stride + p * t.tile_stride;)
  const int64_t row = SIDE * t.position_stride;
  constexpr int kStep = WINOGRAD_BYTES * LANES * 4 / SIDE;
  const uint8_t* next = t.next_weights + (int64_t)COLUMN * t.groups * kStep;
  const auto add_products = [&](auto& sums) {  // of a group of four channels
    vec u[SIDE];
    column_weights<SIDE, COLUMN>(w, u);
    EACH_ROW(EACH_PIXEL(sums[i][p] = dot_four(sums[i][p], u[i], a[p] + i * row);))
    // Each column fetches its share of the weights that come next, from the outer caches to the inner: early and evenly.
    __builtin_prefetch(next), __builtin_prefetch(next + kStep / 2);
    EACH_PIXEL(a[p] += 4;)
    next += kStep, w += WINOGRAD_BYTES * LANES * 4;
  };
#ifdef SUMS_IN_PAIRS
  constexpr int kMost = winograd_groups_in_sums(SIDE, COLUMN);
  for (int left = t.groups; left > 0; left -= kMost) {
    vec sums[SIDE][P];
    EACH_ROW(EACH_PIXEL(sums[i][p] = vec{};))
    for (int g = left < kMost ? left : kMost; g > 0; --g) add_products(sums);
    EACH_ROW(EACH_PIXEL(acc[i][p] = add_sums(acc[i][p], sums[i][p], 1);))
  }
#else
  for (int g = 0; g < t.groups; ++g) add_products(acc);
#endif
}

template <int SIDE, int P, int COLUMN>
static inline void wide_column_products(const WinogradTile& t, vec (&acc)[SIDE][P]) {
  constexpr int kRow = LANES * 2;
  EACH_ROW(EACH_PIXEL(acc[i][p] = vec{};))
  const int64_t row = SIDE * t.position_stride, first = (int64_t)COLUMN * t.groups * SIDE * kRow;
  const uint8_t* w = t.weights + first;
  const uint8_t* a[P];
  EACH_PIXEL(a[p] = t.input + COLUMN * t.position_stride + p * t.tile_stride;)
  for (int g = 0; g < t.groups; ++g, w += SIDE * kRow) {
    EACH_ROW(const vec u = widen(w + i * kRow); EACH_PIXEL(acc[i][p] = dot_two(acc[i][p], u, a[p] + i * row);))
    for (int i = 0; i < SIDE * kRow; i += 64) __builtin_prefetch(w + kPrefetchBytes + i);
    EACH_PIXEL(a[p] += 4;)
  }
}

// A column of positions at a time: its SIDE rows stay in registers and leave them combined to the rows of A^T M, in less space.
// rows[column][tile][2 or 4]
template <int SIDE, int P, int COLUMN>
static inline void winograd_column(const WinogradTile& t, unsigned_ints* rows) {
  vec acc[SIDE][P];
  if constexpr (SIDE == 6) wide_column_products<SIDE, P, COLUMN>(t, acc);
  else column_products<SIDE, P, COLUMN>(t, acc);
  EACH_PIXEL(alignas(64) unsigned_ints m[SIDE]; EACH_ROW(m[i] = (unsigned_ints)acc[i][p];)
             combine<SIDE>(m, 1, rows + (COLUMN * P + p) * winograd_outputs(SIDE));)
}

template <Residual R, bool BYTES, int SIDE>
static inline void winograd_finish(const Epilogue& e, const Output& o, const unsigned_ints* rows, int tiles, int channels) {
  constexpr int kOutputs = winograd_outputs(SIDE);
  const Finish f(e);
  const floats gain = *(const floats*)e.gain * f.unit, bias = *(const floats*)e.bias;
  const int64_t out = o.first_channel * (BYTES ? 1 : 4), residual = o.first_channel * (R == Residual::kBytes ? 1 : 4);
  for (int r = 0; r < tiles * kOutputs; ++r) {
    alignas(64) unsigned_ints y[kOutputs];
    combine<SIDE>(rows + r, tiles * kOutputs, y);
    for (int x = 0; x < kOutputs; ++x) {
      const int p = r * kOutputs + x;
      if (!o.out[p]) continue;
      const ints sum = SIDE == 6 ? (ints)(y[x] * kInverseOfNine) >> 6 : (ints)y[x];
      const void* const from = R == Residual::kNone ? nullptr : (const char*)o.residual[p] + residual;
      finish_vector<R, BYTES>(f, (char*)o.out[p] + out, from, channels, sum, gain, bias);
    }
  }
}

template <int SIDE, int P>
static void winograd_tiles(const WinogradTile& t, const Epilogue& e, const Output& o, int channels) {
  alignas(64) unsigned_ints rows[SIDE * P * winograd_outputs(SIDE)];  // deduced types lose the attribute that allows less
  winograd_column<SIDE, P, 0>(t, rows), winograd_column<SIDE, P, 1>(t, rows);
  winograd_column<SIDE, P, 2>(t, rows), winograd_column<SIDE, P, 3>(t, rows);
  if constexpr (SIDE > 4) winograd_column<SIDE, P, 4>(t, rows);
  if constexpr (SIDE > 5) winograd_column<SIDE, P, 5>(t, rows);
  by_kind(e, o, [&](auto residual, auto to_bytes) { winograd_finish<residual.value, to_bytes.value, SIDE>(e, o, rows, P, channels); });
}

static void winograd(int side, const WinogradTile& t, const Epilogue& e, const Output& o, int channels) {
  if (side == 4) with_count<TILES4>(t.tiles, [&]<int P>(Constant<P>) { winograd_tiles<4, P>(t, e, o, channels); });
  else if (side == 5) with_count<TILES5>(t.tiles, [&]<int P>(Constant<P>) { winograd_tiles<5, P>(t, e, o, channels); });
  else with_count<TILES6>(t.tiles, [&]<int P>(Constant<P>) { winograd_tiles<6, P>(t, e, o, channels); });
}
