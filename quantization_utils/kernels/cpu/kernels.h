// What networks (plan.cpp, run.cpp), linear layers and encoders ask of an instruction set (isa_*.cpp), as plain structs and
// function pointers.
//
// Everything is one matrix product C[pixel][channel] += A[pixel][k] * W[k][channel] with unsigned 8-bit A and signed W.
// A "pixel" is a row of A given by a pointer; its K bytes are `runs` contiguous runs, `run_stride` bytes apart (a
// convolution over NHWC reads kernel-width * channels contiguous bytes per kernel row; a linear layer has one run).
#pragma once
#include <cstdint>

namespace ternary {

constexpr int kMaxPixels = 32;    // upper limits of any instruction set's pixels per tile,
constexpr int kMaxChannels = 64;  // channels per tile,
constexpr int kMaxOutputs = 64;   // and pixels that a tile, or the tiles of a Winograd product, write

// How weights are stored. The product's accumulators, and why they cannot overflow:
//   kTwoBit: four input groups share a byte, two bits each: the last (bits 6-7) in two's complement, the others as w + 2, which
//            is two's complement with the upper bit turned over. Several pixels: a group is moved to the top two bits (shift,
//            AND, and for the others XOR 128, one instruction on AVX-512), so that the signed byte is 64 * w. One pixel: the
//            bits are used where they stand (AND only), with an accumulator each, (w + 2) * 1, 4, 16, and w * 64; then twice
//            the sum of the group's activations is taken off. |sum(48 * a)| over a quarter of K is below 64 * 255 * K too.
//            acc = 64 * sum(w * a): |acc| <= 64 * 255 * K < 2^31 for K <= 131,586 (`most_inputs`, checked when packing).
//            AVX2 adds pairs in 16 bits instead: tables make -1, 0 and 1 of the bits, and the sums of `kGroupsInSums` groups of
//            16 inputs, four pairs each, are at most 64 * 2 * 255 = 32,640 <= 32,767. They then count 64 times.
//   kSmall:  ternary weights as signed bytes: |acc| <= 255 * K < 2^31 for K <= 8,421,504 (checked); pair sums <= 510.
//   kInt8:   signed bytes, |w| <= 127: |acc| <= 127 * 255 * K < 2^31 for K <= 66,311 (checked). On AVX2 the pairs would
//            saturate (64,770), so they are widened to 16 bits first.
// An average pool sums a plane of at most 255 * pixels, as kSmall. A linear layer of signed activations a - 128 starts at
// -128 * sum(w): at any time its accumulator is a sum of terms w * (a - 128) and w * -128, so it is smaller still.
constexpr int kGroupsInSums = 16;
constexpr uint8_t kTwoBitZeros = 0x2A;  // four zero weights of kTwoBit
enum class Weights : int { kTwoBit, kSmall, kInt8 };
static constexpr int64_t most_inputs(Weights kind) {
  return INT32_MAX / 255 / (kind == Weights::kTwoBit ? 64 : kind == Weights::kSmall ? 1 : 127);
}
static constexpr Weights storage_of(bool is_ternary, int64_t inputs) {
  return !is_ternary ? Weights::kInt8 : inputs <= most_inputs(Weights::kTwoBit) ? Weights::kTwoBit : Weights::kSmall;
}
static constexpr float unit_of(Weights kind) { return kind == Weights::kTwoBit ? 1 / 64.0f : 1.0f; }

struct Tile {
  const uint8_t* pixels[kMaxPixels];  // where each pixel's first run starts
  int count;                          // pixels, 1 … max_pixels
  int channels;                       // real channels of this block, 1 … max_channels
  int runs, groups;                   // groups a run: 16 bytes of A each for kTwoBit, else 4
  int64_t run_stride;                 // bytes of A
  const uint8_t* weights;             // [run][group][vector of lanes channels][lanes * 4 bytes]
  const int32_t* init;                // start of the accumulators, one per channel, padded to whole vectors
};

// Winograd's convolution for 3x3 kernels, as a scheme of `side` x `side` products for each tile of 2x2 or 4x4 outputs:
//   Y = A^T [ (G g G^T) * (B^T d B) ] A.
// Sides 4 and 5 are exact in 8 bits with activations of at most 63, side 6 is in 16 bits with any, at half as many products an
// instruction.
// Stride 1, side 4, is F(2x2,3x3) with 2G, so that U is an integer, |u| <= 9, and Y is 4 times the result:
//   B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]   2G = [2 0 0; 1 1 1; 1 -1 1; 0 0 2]   A^T = [1 1 1 0; 0 1 -1 -1]
// Stride 2, side 5, is F(2,2) over the odd inputs with the outer taps, and the even inputs times the middle tap; |u| <= 4:
//   B^T d = (d0 - d2, d2, d2 - d4, d1, d3)   G g = (g0, g0 + g2, g2, g1, g1)   A^T m = (m0 + m1 + m3, m1 - m2 + m4)
// With activations of at most 63, V lies in +-126, a signed byte, except where stride 1 has a sum in both dimensions (0 ... 252):
// there 128 is taken off, and the accumulators start at 128 * sum(u).
// The products take the weights as the unsigned factor, because a processor reads four signed bytes from memory, spreads them
// and multiplies in one instruction. So U is made of v + 10, between 1 and 48 everywhere, and Y is too large by
//   10 * A^T (B^T d B * o o^T) A summed over channels,   o = 1, or (1, 2, 1, 1, 1) for stride 2, whose second row adds two,
// which is ten times the sum of d over the pixels (y, x), y + 2 and x + 2 (stride 1), or over y ... y + 2, x ... x + 2
// (stride 2): the same for all output channels, taken with the transform. The four corner positions are each a part of one
// output only, so that is where it is taken off: their accumulators start below zero.
// G has one row too many for its rank: with v = (2 g0, g0 + g1 + g2, 2 g2) in both dimensions, nine numbers, stride 1's U is
// v in rows and columns 0, 1, 3 and v0 + v2 - v1 in 2; stride 2's is made of v = 2 g, without a division, so Y is twice the
// result there. Eight of the nine are even and within +-6 (5 + v/2 is a nibble), the one in the middle is within +-9: five bytes
// for a kernel instead of 16 or 25, small enough to come from the outer caches as fast as they are used. AVX2 reads
// nine, of which it uses fewer in a cycle: it would lose more by taking nibbles apart.
// Pair sums of AVX2's vpmaddubsw: 2 * 48 * 128 <= 32,767. |M| <= 48 * 128 * C, and Y is a sum of at most nine and of a start,
// at most 10 * 9 * 63 * C: below 2^31 for C < 35,000.
constexpr int kWinogradOffset = 10;
// Side 6, stride 1, is F(4x4,3x3), through 0, 1, -1, 2, -2 and infinity, its fractions taken out of G (each row of U is an integer):
//   B^T = [4 0 -5 0 1 0; 0 4 4 -1 -1 0; 0 -4 4 1 -1 0; 0 -2 -1 2 1 0; 0 2 -1 -2 1 0; 0 4 0 -5 0 1]
//   G = [1 0 0; 1 1 1; 1 -1 1; 1 2 4; 1 -2 4; 0 0 1]   A^T = [6 4 4 1 1 0; 0 4 -4 2 -2 0; 0 4 4 4 4 0; 0 4 -4 8 -8 24]
// so Y is 24 x 24 times the result y. V is within +-68 * 255 = 17,340: of the second row, for one, 8 * 8 + 2 * 2 activations are
// added. |u| <= 7 * 7 is a signed byte. Y does not always fit in 32 bits, but sums that wrap around are right modulo 2^32, where 9 has
// an inverse: Y / 9 is 64 y, and y the upper 26 bits, as |y| <= 9 * 255 * C < 2^25 for C < 14,000.
constexpr uint32_t kInverseOfNine = 954437177;
static_assert(kInverseOfNine * 9 == 1);
static constexpr int winograd_outputs(int side) { return side == 6 ? 4 : 2; }        // of a tile, in a dimension
static constexpr int winograd_element_bytes(int side) { return side == 6 ? 2 : 1; }  // of V
// How many groups of four channels fit in 16-bit sums of pairs, by the largest |U V| of a column of positions, its offset included.
// Stride 1: U goes up to 10 + 6 where |V| <= 126, in the two columns in the middle up to 10 + 9 where |V| <= 128. Stride 2, whose
// offsets are added as the numbers are: where U goes up to 20 + 4, in the second column to 40 + 8, V is a difference of two
// activations at most; where it is one of four, U is half of that.
static constexpr int winograd_groups_in_sums(int side, int column) {
  const int largest = side == 4 ? (column % 3 == 0 ? 16 * 126 : 19 * 128) : (column == 1 ? 48 * 63 : 24 * 63);
  return 32767 / (2 * largest);
}
static constexpr bool winograd_has_offset(int side, int i, int j) { return side == 4 && i == 1 && j == 1; }

struct WinogradTile {
  const uint8_t* input;          // transformed: [position][tile][channel]
  const int32_t* start;          // [tile][2][2]: where the accumulators of the four corner positions start; not of side 6
  int64_t position_stride, tile_stride;  // bytes
  int tiles, groups;             // tiles: 1 ... tiles[] of the instruction set; groups of 4 input channels, of side 6 of 2
  const uint8_t* weights;        // [group][5][lanes * 4 bytes]: v00 | v20 << 4, v02 | v22 << 4, v10 | v12 << 4, v01 | v21 << 4, v11;
                                 // or [group][9][lanes * 4 bytes]: v00, v10, v20, v01 ... v22; side 6: U, [column][group][row][lanes * 2 bytes]
  const uint8_t* next_weights;   // those of the following call, to be fetched meanwhile
  const int32_t* init;           // [lanes]: start of the accumulators where there is an offset
};

// y = float(acc) * (gain_n * unit) + bias_n; y += residual * residual_gain; ReLU; round; clamp.
// Each is rounded once, a product with the sum that it goes into (multiply_add). The unit of the accumulators is a power of two,
// so it changes no rounding: float(acc) * (gain * unit) = float(acc * unit) * gain, bit for bit (of gains above 2^-120).
struct Epilogue {
  const float* gain;
  const float* bias;
  float residual_gain;
  bool relu;
  int out_max;  // 0: float32 output
  float unit;
};

// Where the pixels of a tile go. Pointers already point at the tile's first channel.
struct Output {
  void* out[kMaxOutputs];
  const void* residual[kMaxOutputs];  // uint8, or float32 if residual_is_float; ignored unless has_residual
  bool has_residual, residual_is_float;
  int first_channel;                     // Winograd: added to the pointers; a null pointer is a pixel beyond an edge
};

// Where the pixels of a tile go that are rows of a linear layer with a scale each: float32.
//   y = float(acc) * (gain_n * row_scale) + bias_n; y = GELU(y) or y += out; out = y     (gain_n: in the accumulators' unit)
enum class Then { kStore, kGelu, kAdd };
struct LinearOutput {
  const float *gain, *bias;  // of the tile's channels, padded to whole vectors
  const float* row_scale;
  float* out;                // the tile's first channel of its first row
  int64_t stride;
  Then then;
};

constexpr int kMaxQueries = 24;  // of one call of attention: a multiple of every instruction set's tile

// One head of one image: softmax(scale * Q K^T) V over float32 rows `stride` apart. `dim` is a multiple of 16.
struct Attention {
  const float *q, *k, *v;
  const float* keys;  // k transposed, [dim][tokens padded to whole vectors]: see transpose_keys
  int64_t stride;
  int tokens, dim;
  float scale;
};

struct Kernels {
  const char* name;
  int lanes;         // int32 lanes of a vector; a block has up to max_vectors of them
  int max_vectors;   // vectors of channels per tile
  int max_pixels;    // pixels per tile
  int tiles[3];      // Winograd tiles at a time, of side 4, 5 and 6
  int winograd_bytes;  // of weights for one 3x3 kernel: 5 or 9; of side 6 they are 36
  void (*begin)();   // each thread calls these before and after all others
  void (*end)();
  // acc[count][vectors * lanes], vectors = ceil(channels / lanes); has room for max_pixels
  void (*multiply)(Weights, const Tile&, int32_t* acc);
  // The product and what LinearOutput says, in registers where it can be. A tile may have more channels than max_vectors: blocks of
  // panels one after the other. Its pixels stand evenly, max_pixels of them readable.
  void (*multiply_rows)(Weights, const Tile&, const LinearOutput&);
  // The bytes of `in` whose bit in used[words] is set, one after the other; writes up to 64 beyond them. Returns how many.
  int (*gather)(const uint64_t* used, int words, const uint8_t* in, uint8_t* out);
  // `pixels` rows of acc (vectors * lanes apart) to output.
  void (*finish)(const Epilogue&, const Output&, const int32_t* acc, int pixels, int channels);
  // V[position][channel] of one patch of side x side pixels, positions `v_stride` bytes apart, and its start[2][2], which side 6 has not.
  void (*winograd_input)(int side, const uint8_t* patch, int64_t row_stride, int64_t pixel_stride, int channels, uint8_t* v, int64_t v_stride, int32_t* start);
  // Products, output transform and epilogue for one vector of channels, of which `channels` are real; outputs [tile][row][column].
  void (*winograd)(int side, const WinogradTile&, const Epilogue&, const Output&, int channels);
  // float32 image planes -> uint8 NHWC row of `width` pixels, `stride` bytes each, round(x * 255) clamped to 0 … 255
  void (*image_row)(const float* const* planes, int channels, int width, uint8_t* out, int stride);
  // signed codes + 128 of one row; returns the scale: NaN, and with it all that follows from the row, unless all of it is finite
  float (*quantize_row)(const float* x, int64_t k, int code_max, uint8_t* out);
  void (*max_row)(const uint8_t* in, int n, uint8_t* inout);    // inout = max(inout, in)
  void (*add_row)(const uint8_t* in, int n, int32_t* inout);    // inout += in
  // Of a transformer, float32. Their sums are in the order of this instruction set's vectors.
  void (*layer_norm)(const float* x, int n, const float* weight, const float* bias, float epsilon, float* out);
  void (*transpose_keys)(const float* k, int64_t stride, int tokens, int dim, float* keys);
  // Queries first … first + queries - 1; scores: room for `queries` rows of padded tokens.
  void (*attention)(const Attention&, int first, int queries, float* scores, float* out, int64_t out_stride);
  int64_t (*peak_multiply_adds)(int64_t iterations, const uint8_t* data);  // benchmark: how many were done; data: 256 bytes
  void (*read_memory)(const uint8_t* data, int64_t bytes);                 // benchmark
};

const Kernels* amx_kernels();
const Kernels* avx512vnni_kernels();  // nullptr where not compiled in or the processor lacks it
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace ternary
