// Part of isa_avx512vnni.cpp: products on AMX's tiles, 16 pixels x 16 channels x 64 inputs an instruction. A row of a tile of
// weights is what one plane of one vector of panels (kernels.h) is already: 16 channels x 4 inputs. So panels, accumulators and
// their bounds are the same, and 2-bit weights are unpacked a few tiles at a time into the nearest cache.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD_TILE(T, FROM, STRIDE) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T : : "r"(FROM), "r"((int64_t)(STRIDE)) : "memory")
#define STORE_TILE(T, TO, STRIDE) __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" : : "r"(TO), "r"((int64_t)(STRIDE)) : "memory")
#define MULTIPLY_TILES(C, A, B) __asm__ volatile("tdpbusd %%tmm" #B ", %%tmm" #A ", %%tmm" #C ::)  // C += unsigned A * signed B

constexpr int kTileRows = 16, kTileBytes = 64;  // rows of a tile, and bytes of each
constexpr int kAhead = 3;
constexpr int kFewPixels = 4;                   // so many are faster on vectors

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

// Where the rows of a tile of pixels are: in place if they lie evenly, else copied, a tile's bytes at a time.
struct PixelTile {
  const uint8_t* const* pixels;
  int count;
  int64_t stride;  // 0: to be copied
  PixelTile(const uint8_t* const* pixels, int count) : pixels(pixels), count(count), stride(count == kTileRows ? pixels[1] - pixels[0] : 0) {
    for (int p = 2; stride && p < count; ++p)
      if (pixels[p] - pixels[p - 1] != stride) stride = 0;
  }
  // `room`: kTileRows x kTileBytes; rows beyond the pixels stay whatever they are.
  void copy(int64_t offset, uint8_t* room) const {
    for (int p = 0; !stride && p < count; ++p) *(vec*)(room + p * kTileBytes) = load_weights(pixels[p] + offset);
  }
  const uint8_t* at(int64_t offset, const uint8_t* room) const { return stride ? pixels[0] + offset : room; }
  int64_t row_bytes() const { return stride ? stride : kTileBytes; }
};

// `J` tiles of weights, for 64 inputs and J of a panel's `vectors`, as rows of `groups` groups from w on; beyond them zeros.
template <Weights W, int J>
static inline void unpack_tiles(const uint8_t* w, int vectors, int groups, uint8_t (*to)[kTileRows][kTileBytes]) {
  constexpr int kPlanes = W == Weights::kTwoBit ? 4 : 1;
  for (int g = 0; g < kTileRows / kPlanes; ++g, w += vectors * kTileBytes) {
    vec codes[J];
    if (g < groups) {
      EACH_VECTOR(codes[j] = load_weights(w + j * kTileBytes); __builtin_prefetch(w + j * kTileBytes + kTilePrefetchBytes);)
    } else {
      EACH_VECTOR(codes[j] = (vec)(ints{} + (W == Weights::kTwoBit ? 0x2A2A2A2A : 0));)
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

// One or two tiles of pixels and J <= 2 vectors of channels; acc: rows of t's vectors, from the first of these on.
template <Weights W, int J>
static void tile_products(const Tile& t, int pixels, int first_vector, int32_t* acc) {
  const int vectors = (t.channels + LANES - 1) / LANES;
  const bool two = pixels > kTileRows;
  const PixelTile upper(t.pixels, two ? kTileRows : pixels), lower(t.pixels + kTileRows, two ? pixels - kTileRows : 0);
  constexpr int kGroups = W == Weights::kTwoBit ? kTileBytes / 16 : kTileBytes / 4;  // of a tile
  alignas(64) uint8_t weights[kAhead + 1][J][kTileRows][kTileBytes], room[kAhead + 1][2][kTileRows * kTileBytes];
  const int32_t* const init = t.init + first_vector * LANES;
  LOAD_TILE(0, init, 0);
  if constexpr (J > 1) LOAD_TILE(1, init + LANES, 0);
  if (two) {
    LOAD_TILE(2, init, 0);
    if constexpr (J > 1) LOAD_TILE(3, init + LANES, 0);
  }
  const int steps_a_run = (t.groups + kGroups - 1) / kGroups, steps = t.runs * steps_a_run;
  const auto offset_of = [&](int step) { return step / steps_a_run * t.run_stride + (int64_t)(step % steps_a_run) * kTileBytes; };
  const auto prepare = [&](int step) {
    const int run = step / steps_a_run, g = step % steps_a_run * kGroups;
    upper.copy(offset_of(step), room[step % (kAhead + 1)][0]), lower.copy(offset_of(step), room[step % (kAhead + 1)][1]);
    const uint8_t* w = t.weights + (((int64_t)run * t.groups + g) * vectors + first_vector) * kTileBytes;
    unpack_tiles<W, J>(w, vectors, t.groups - g, weights[step % (kAhead + 1)]);
  };
  for (int step = 0; step < kAhead && step < steps; ++step) prepare(step);
  for (int step = 0; step < steps; ++step) {
    if (step + kAhead < steps) prepare(step + kAhead);  // ahead, so that the tiles do not wait for what is being written
    const int64_t offset = offset_of(step);
    const auto& b = weights[step % (kAhead + 1)];
    LOAD_TILE(6, b[0], kTileBytes);
    LOAD_TILE(4, upper.at(offset, room[step % (kAhead + 1)][0]), upper.row_bytes());
    MULTIPLY_TILES(0, 4, 6);
    if constexpr (J > 1) {
      LOAD_TILE(7, b[1], kTileBytes);
      MULTIPLY_TILES(1, 4, 7);
    }
    if (!two) continue;
    LOAD_TILE(5, lower.at(offset, room[step % (kAhead + 1)][1]), lower.row_bytes());
    MULTIPLY_TILES(2, 5, 6);
    if constexpr (J > 1) MULTIPLY_TILES(3, 5, 7);
  }
  int32_t* const to = acc + first_vector * LANES;
  const int64_t row = (int64_t)vectors * LANES * sizeof(int32_t), below = kTileRows * vectors * LANES;
  STORE_TILE(0, to, row);
  if constexpr (J > 1) STORE_TILE(1, to + LANES, row);
  if (!two) return;
  STORE_TILE(2, to + below, row);
  if constexpr (J > 1) STORE_TILE(3, to + below + LANES, row);
}

template <Weights W>
static void multiply_on_tiles(const Tile& t, int pixels, int32_t* acc) {
  const int vectors = (t.channels + LANES - 1) / LANES;
  int v = 0;
  for (; v + 2 <= vectors; v += 2) tile_products<W, 2>(t, pixels, v, acc);
  if (v < vectors) tile_products<W, 1>(t, pixels, v, acc);
}

// As `multiply`, of up to 32 pixels; acc has room for whole tiles of them.
static void multiply_tiles(Weights weights, const Tile& t, int32_t* acc) {
  const int over = t.count % kTileRows, on_tiles = over <= kFewPixels ? t.count - over : t.count;
  if (on_tiles) {
    switch (weights) {
      case Weights::kTwoBit: multiply_on_tiles<Weights::kTwoBit>(t, on_tiles, acc); break;
      case Weights::kSmall: multiply_on_tiles<Weights::kSmall>(t, on_tiles, acc); break;
      case Weights::kInt8: multiply_on_tiles<Weights::kInt8>(t, on_tiles, acc); break;
    }
  }
  if (on_tiles == t.count) return;
  Tile rest = t;
  rest.count = over;
  for (int p = 0; p < over; ++p) rest.pixels[p] = t.pixels[on_tiles + p];
  multiply(weights, rest, acc + (int64_t)on_tiles * ((t.channels + LANES - 1) / LANES) * LANES);
}

static void multiply_rows_tiles(Weights weights, const Tile& t, const LinearOutput& r) {
  if (t.count <= kFewPixels) return multiply_rows(weights, t, r);
  alignas(64) int32_t acc[kMaxPixels * kMaxChannels];
  multiply_tiles(weights, t, acc);
  switch (r.then) {
    case Then::kStore: return finish_rows_then<Then::kStore>(t, r, acc);
    case Then::kGelu: return finish_rows_then<Then::kGelu>(t, r, acc);
    case Then::kAdd: return finish_rows_then<Then::kAdd>(t, r, acc);
  }
}

static int64_t peak_multiply_adds_tiles(int64_t iterations, const uint8_t* data) {
  LOAD_TILE(4, data, 0); LOAD_TILE(5, data, 0); LOAD_TILE(6, data, 0); LOAD_TILE(7, data, 0);
  for (int64_t i = 0; i < iterations; ++i) {
    MULTIPLY_TILES(0, 4, 6); MULTIPLY_TILES(1, 4, 7); MULTIPLY_TILES(2, 5, 6); MULTIPLY_TILES(3, 5, 7);
  }
  return iterations * 4 * kTileRows * LANES * kTileBytes;
}

static Kernels with_tiles(Kernels k) {
  k.name = "amx", k.max_pixels = 2 * kTileRows, k.begin = begin_tiles, k.end = end_tiles;
  k.multiply = multiply_tiles, k.multiply_rows = multiply_rows_tiles, k.peak_multiply_adds = peak_multiply_adds_tiles;
  return k;
}

// Whether the processor has tiles and the system lets this process use them, which it has to be asked.
static bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kInt8Products = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kInt8Products)) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

#undef LOAD_TILE
#undef STORE_TILE
#undef MULTIPLY_TILES
