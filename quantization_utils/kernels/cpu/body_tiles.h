// Part of isa_avx512vnni.cpp: products on AMX's tiles, 16 pixels x 16 channels x 64 inputs an instruction. A row of a tile of
// weights is what one plane of one vector of panels (kernels.h) is already: 16 channels x 4 inputs. So panels, accumulators and
// their bounds are the same, and 2-bit weights are unpacked a few tiles at a time into the nearest cache.

#define LOAD_TILE(T, FROM, STRIDE) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T : : "r"(FROM), "r"((int64_t)(STRIDE)) : "memory")
#define STORE_TILE(T, TO, STRIDE) __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" : : "r"(TO), "r"((int64_t)(STRIDE)) : "memory")
#define MULTIPLY_TILES(C, A, B) __asm__ volatile("tdpbusd %%tmm" #B ", %%tmm" #A ", %%tmm" #C ::)  // C += unsigned A * signed B

constexpr int kTileRows = 16, kTileBytes = 64;  // rows of a tile, and bytes of each
constexpr int kFewPixels = 4;                   // so many are faster on vectors
constexpr int kAhead = 3, kSlots = kAhead + 1;  // steps between writing tiles and loading them: a load waits for what is on its way

// Configures a thread's eight tiles, all of the full size. Whoever else uses tiles does so in between, in its own way.
static void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) config.bytes[t] = kTileBytes, config.rows[t] = kTileRows;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
static void end_tiles() { __asm__ volatile("tilerelease" ::); }

// Where the rows of a tile of pixels are: in place if they lie evenly, else copied, a tile's bytes at a time. Beyond the pixels
// a tile has whatever is there: `readable` says that this can be in place, too.
struct PixelTile {
  const uint8_t* const* pixels;
  int count;
  int64_t stride;  // 0: to be copied
  PixelTile(const uint8_t* const* pixels, int count, bool readable) : pixels(pixels), count(count), stride(0) {
    if (count < 2 || (count < kTileRows && !readable)) return;
    stride = pixels[1] - pixels[0];
    for (int p = 2; p < count; ++p)
      if (pixels[p] - pixels[p - 1] != stride) stride = 0;
  }
  void copy(int64_t offset, uint8_t* room) const {
    for (int p = 0; !stride && p < count; ++p) *(vec*)(room + p * kTileBytes) = load_weights(pixels[p] + offset);
  }
  const uint8_t* at(int64_t offset, const uint8_t* room) const { return stride ? pixels[0] + offset : room; }
  int64_t row_bytes() const { return stride ? stride : kTileBytes; }
};

// Two tiles of weights, for 64 inputs and two of a panel's `vectors`, from `groups` groups at w; what is missing to a tile is zeros.
template <Weights W>
static inline void unpack_tiles(const uint8_t* w, int vectors, int groups, uint8_t (*to)[kTileRows][kTileBytes]) {
  constexpr int J = 2, kPlanes = W == Weights::kTwoBit ? 4 : 1;
  for (int g = 0; g < kTileRows / kPlanes; ++g, w += vectors * kTileBytes) {
    vec codes[J];
    if (g < groups) {
      EACH_VECTOR(codes[j] = load_weights(w + j * kTileBytes); __builtin_prefetch(w + j * kTileBytes + kTilePrefetchBytes);)
    } else {
      EACH_VECTOR(codes[j] = (vec)(ints{} + (W == Weights::kTwoBit ? kTwoBitZeros * 0x01010101 : 0));)
    }
    const auto store = [&](int j, int row, vec v) { *(vec*)to[j][row] = v; };
    if constexpr (W == Weights::kTwoBit) {
      EACH_VECTOR(store(j, g * 4, plane<0>(codes[j])); store(j, g * 4 + 1, plane<1>(codes[j]));
                  store(j, g * 4 + 2, plane<2>(codes[j])); store(j, g * 4 + 3, plane<3>(codes[j]));)
    } else {
      EACH_VECTOR(store(j, g, codes[j]);)
    }
  }
}

// Two vectors of a block's channels: where their weights and the start of their accumulators are.
struct Pair {
  const uint8_t* weights;
  int vectors;  // of the block
  const int32_t* init;
};

// The accumulators of t's pixels and of one pair of vectors after the other. pair_of(q) says which; store(q) takes tiles 0 and 1, and if
// there are more than 16 pixels 2 and 3; meanwhile(q, step, steps) has time for other work while tiles are being multiplied.
template <Weights W, typename PairOf, typename Store, typename Meanwhile>
static inline void tile_products(const Tile& t, bool readable, int pairs, const PairOf& pair_of, const Store& store, const Meanwhile& meanwhile) {
  constexpr int kGroups = W == Weights::kTwoBit ? kTileBytes / 16 : kTileBytes / 4;  // of a tile
  alignas(64) uint8_t weights[kSlots][2][kTileRows][kTileBytes], room[kSlots][2][kTileRows * kTileBytes];
  const bool two = t.count > kTileRows;
  const PixelTile upper(t.pixels, two ? kTileRows : t.count, readable), lower(t.pixels + kTileRows, two ? t.count - kTileRows : 0, readable);
  const int steps_a_run = (t.groups + kGroups - 1) / kGroups, steps = t.runs * steps_a_run;
  struct Position {
    int pair = 0, run = 0, step = 0;  // step: of the run
  } next;
  int slot = 0;  // of `next`
  Pair next_pair = pair_of(0);
  const auto prepare = [&] {
    if (next.pair == pairs) return;
    const int g = next.step * kGroups;
    const int64_t offset = next.run * t.run_stride + (int64_t)next.step * kTileBytes;
    upper.copy(offset, room[slot][0]), lower.copy(offset, room[slot][1]);
    unpack_tiles<W>(next_pair.weights + ((int64_t)next.run * t.groups + g) * next_pair.vectors * kTileBytes, next_pair.vectors, t.groups - g, weights[slot]);
    slot = (slot + 1) % kSlots;
    if (++next.step < steps_a_run) return;
    next.step = 0;
    if (++next.run < t.runs) return;
    next.run = 0;
    if (++next.pair < pairs) next_pair = pair_of(next.pair);
  };
  for (int i = 0; i < kAhead; ++i) prepare();
  int now = 0;  // the slot
  for (int q = 0; q < pairs; ++q) {
    const int32_t* const init = pair_of(q).init;
    LOAD_TILE(0, init, 0);
    LOAD_TILE(1, init + LANES, 0);
    if (two) {
      LOAD_TILE(2, init, 0);
      LOAD_TILE(3, init + LANES, 0);
    }
    for (int run = 0, done = 0; run < t.runs; ++run)
      for (int step = 0; step < steps_a_run; ++step, now = (now + 1) % kSlots) {
        prepare();
        const int64_t offset = run * t.run_stride + (int64_t)step * kTileBytes;
        LOAD_TILE(6, weights[now][0], kTileBytes);
        LOAD_TILE(4, upper.at(offset, room[now][0]), upper.row_bytes());
        MULTIPLY_TILES(0, 4, 6);
        LOAD_TILE(7, weights[now][1], kTileBytes);
        MULTIPLY_TILES(1, 4, 7);
        if (two) {
          LOAD_TILE(5, lower.at(offset, room[now][1]), lower.row_bytes());
          MULTIPLY_TILES(2, 5, 6);
          MULTIPLY_TILES(3, 5, 7);
        }
        meanwhile(q, done++, steps);
      }
    store(q);
  }
}

template <Weights W>
static void multiply_on_tiles(const Tile& t, int32_t* acc) {
  const int vectors = (t.channels + LANES - 1) / LANES;
  const int64_t row = (int64_t)vectors * LANES * sizeof(int32_t), below = kTileRows * vectors * LANES;
  tile_products<W>(
      t, false, (vectors + 1) / 2, [&](int q) { return Pair{t.weights + q * 2 * kTileBytes, vectors, t.init + q * 2 * LANES}; },
      [&](int q) {
        int32_t* const to = acc + q * 2 * LANES;
        const bool whole = q * 2 + 1 < vectors;
        STORE_TILE(0, to, row);
        if (whole) STORE_TILE(1, to + LANES, row);
        if (t.count <= kTileRows) return;
        STORE_TILE(2, to + below, row);
        if (whole) STORE_TILE(3, to + below + LANES, row);
      },
      [](int, int, int) {});
}

// As `multiply`, of up to 32 pixels; acc has room for whole tiles of them.
static void multiply_tiles(Weights weights, const Tile& t, int32_t* acc) {
  if (t.count <= kFewPixels) return multiply(weights, t, acc);
  switch (weights) {
    case Weights::kTwoBit: return multiply_on_tiles<Weights::kTwoBit>(t, acc);
    case Weights::kSmall: return multiply_on_tiles<Weights::kSmall>(t, acc);
    case Weights::kInt8: return multiply_on_tiles<Weights::kInt8>(t, acc);
  }
}

// All of a layer's channels; the rows of a pair of vectors are finished while the next one is multiplied.
template <Weights W, Then THEN>
static void rows_on_tiles(const Tile& t, const LinearOutput& r) {
  const int vectors = (t.channels + LANES - 1) / LANES, pairs = (vectors + 1) / 2;
  const int64_t block_bytes = (int64_t)t.runs * t.groups * VECTORS * kTileBytes;
  alignas(64) int32_t acc[2][2 * kTileRows][2 * LANES];
  const auto finish_some = [&](int q, int from, int end) {
    for (int j = 0; j < 2; ++j) {
      const int channel = (q * 2 + j) * LANES, n = t.channels - channel < LANES ? t.channels - channel : LANES;
      for (int p = from; p < end && n > 0; ++p) finish_row<THEN>(r, p, channel, n, load_ints(acc[q % 2][p] + j * LANES));
    }
  };
  tile_products<W>(
      t, true, pairs,
      [&](int q) {
        const int block = q * 2 / VECTORS, left = vectors - block * VECTORS;
        return Pair{t.weights + block * block_bytes + q * 2 % VECTORS * kTileBytes, left < VECTORS ? left : VECTORS, t.init + q * 2 * LANES};
      },
      [&](int q) {
        constexpr int64_t kRow = sizeof acc[0][0];
        STORE_TILE(0, acc[q % 2][0], kRow);
        STORE_TILE(1, acc[q % 2][0] + LANES, kRow);
        if (t.count <= kTileRows) return;
        STORE_TILE(2, acc[q % 2][kTileRows], kRow);
        STORE_TILE(3, acc[q % 2][kTileRows] + LANES, kRow);
      },
      [&](int q, int step, int steps) {
        if (q) finish_some(q - 1, step * t.count / steps, (step + 1) * t.count / steps);
      });
  finish_some(pairs - 1, 0, t.count);
}

template <Weights W>
static void rows_on_tiles(const Tile& t, const LinearOutput& r) {
  switch (r.then) {
    case Then::kStore: return rows_on_tiles<W, Then::kStore>(t, r);
    case Then::kGelu: return rows_on_tiles<W, Then::kGelu>(t, r);
    case Then::kAdd: return rows_on_tiles<W, Then::kAdd>(t, r);
  }
}

static void multiply_rows_tiles(Weights weights, const Tile& t, const LinearOutput& r) {
  if (t.count <= kFewPixels) return multiply_rows(weights, t, r);
  switch (weights) {
    case Weights::kTwoBit: return rows_on_tiles<Weights::kTwoBit>(t, r);
    case Weights::kSmall: return rows_on_tiles<Weights::kSmall>(t, r);
    case Weights::kInt8: return rows_on_tiles<Weights::kInt8>(t, r);
  }
}

static int64_t peak_multiply_adds_tiles(int64_t iterations, const uint8_t* data) {
  LOAD_TILE(4, data, 0);
  LOAD_TILE(5, data, 0);
  LOAD_TILE(6, data, 0);
  LOAD_TILE(7, data, 0);
  for (int64_t i = 0; i < iterations; ++i) {
    MULTIPLY_TILES(0, 4, 6);
    MULTIPLY_TILES(1, 4, 7);
    MULTIPLY_TILES(2, 5, 6);
    MULTIPLY_TILES(3, 5, 7);
  }
  return iterations * 4 * kTileRows * LANES * kTileBytes;
}

static Kernels with_tiles(Kernels k) {
  k.name = "amx", k.max_pixels = 2 * kTileRows, k.begin = begin_tiles, k.end = end_tiles;
  k.multiply = multiply_tiles, k.multiply_rows = multiply_rows_tiles, k.peak_multiply_adds = peak_multiply_adds_tiles;
  return k;
}

#undef LOAD_TILE
#undef STORE_TILE
#undef MULTIPLY_TILES
