// A packed network: nodes as Python hands them over, and what one batch size needs to run them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace ternary {

enum class Op : int { kConv, kLinear, kMaxPool, kAvgPool };
constexpr int kNone = -2;
enum class Algorithm : int { kDirect, kWinograd, kSkipping, kPool };

struct NodeSpec {
  Op op;
  int input, residual;  // indices of nodes; -1: the image; residual kNone: none
  bool ternary;
  bool relu;
  int out_max;          // 0: float32
  float residual_gain;
  int n = 0, c = 0;     // channels out and in (a linear layer: c = its whole input)
  int kernel[2], stride[2], padding[2];
  std::vector<int8_t> codes;
  std::vector<float> gain, bias;
  std::vector<uint8_t> pad_values;  // empty: zeros
};

// Throws std::invalid_argument: what a node is or reads that cannot be run.
[[noreturn]] void refuse(int node, const std::string& why);

// Weights in the order the tiles read them, for blocks of `block` channels.
struct Panels {
  Weights kind = Weights::kTwoBit;
  int runs = 0, groups = 0, block = 0;
  int64_t block_bytes = 0;
  Bytes bytes;
  std::vector<int32_t> init;  // per padded channel
};

// weight(n, run, i): code of output channel n at byte i of a run; zero-padded to whole groups and blocks.
template <typename Weight>
Panels pack_panels(const Kernels& isa, Weights kind, int n, int runs, int run_bytes, const Weight& weight) {
  Panels p;
  p.kind = kind, p.runs = runs, p.block = isa.lanes * isa.max_vectors;
  const int group = kind == Weights::kTwoBit ? 16 : 4;
  p.groups = (run_bytes + group - 1) / group;
  const int blocks = (n + p.block - 1) / p.block;
  const int padded = (n + isa.lanes - 1) / isa.lanes * isa.lanes;
  p.block_bytes = (int64_t)runs * p.groups * p.block * 4;
  p.bytes.assign((size_t)runs * p.groups * padded * 4 + 64, kind == Weights::kTwoBit ? kTwoBitZeros : 0);
  p.init.assign((size_t)blocks * p.block, 0);
  for (int b = 0; b < blocks; ++b) {
    const int width = std::min(padded - b * p.block, p.block);
    uint8_t* out = p.bytes.data() + b * p.block_bytes;
    for (int run = 0; run < runs; ++run)
      for (int g = 0; g < p.groups; ++g, out += width * 4)
        for (int ch = 0; ch < width && b * p.block + ch < n; ++ch)
          for (int k = 0; k < group; ++k) {
            const int i = g * group + k;
            if (i >= run_bytes) break;
            const int w = weight(b * p.block + ch, run, i);
            if (kind == Weights::kTwoBit) out[ch * 4 + k % 4] ^= (uint8_t)((w & 3) << (2 * (k / 4)));
            else out[ch * 4 + k] = (uint8_t)w;
          }
  }
  return p;
}

// Ternary weights of a linear layer without those inputs that no channel of a vector reads: a block of one input and `lanes`
// channels that is zero takes no memory, no reading and no multiply-adds. Each vector gathers the inputs that it does read.
struct SparsePanels {
  struct Part {
    int64_t first;             // where the vector's weights start
    int groups;
  };
  int runs = 0, words = 0;     // words of `used` a run
  std::vector<Part> parts;     // per vector of channels
  std::vector<uint64_t> used;  // [vector][run][words], a bit for each byte of a run
  Bytes bytes;                 // for each vector as a block of Panels
};

// A value between nodes: NHWC with a border on all sides (what convolutions pad with), or float32 NHWC without.
struct Value {
  int n = 0, h = 0, w = 0, c = 0;  // real sizes
  int cs = 0;                      // bytes (or floats) from pixel to pixel
  int border = 0, extra = 0;       // extra: further rows and columns below and right, for Winograd's whole tiles
  bool is_float = false;
  int code_max = 255;
  uint8_t* data = nullptr;
  int64_t element_bytes() const { return is_float ? 4 : 1; }
  int64_t row() const { return (int64_t)(w + 2 * border + extra) * cs; }
  int64_t image() const { return row() * (h + 2 * border + extra); }
  int64_t at(int y, int x) const { return (y + border) * row() + (int64_t)(x + border) * cs; }
  // `offset` elements (see `at`) into image `number` of the batch.
  uint8_t* element(int64_t number, int64_t offset) const { return data + (number * image() + offset) * element_bytes(); }
};

struct Step {
  Algorithm algorithm = Algorithm::kPool;
  int winograd_side = 0;                     // 0: not possible
  std::shared_ptr<Panels> direct, winograd;
  std::shared_ptr<SparsePanels> sparse;
  Epilogue epilogue{};
  std::vector<float> gain, bias;             // padded to whole blocks
  std::vector<int64_t> in_offset, out_offset, residual_offset;  // per output pixel of one image, in bytes
  double micros[4] = {};                     // measured at planning, of each algorithm

  // Of accumulators of the channels from `first` on, which count `unit` each.
  Epilogue epilogue_from(int64_t first, float unit) const {
    Epilogue e = epilogue;
    e.gain = gain.data() + first, e.bias = bias.data() + first, e.unit = unit;
    return e;
  }
};

// Winograd's tiles of 2x2 outputs of a whole batch, in groups as even as can be.
struct TileGroups {
  int across, per_image;             // tiles of a row and of an image
  int64_t tiles, groups, largest;    // in all; how many groups; the tiles of the largest
  int64_t positions_bytes, bytes;    // of the largest group's transformed input, and with the starts that follow it
  int64_t first(int64_t group) const { return group * tiles / groups; }
  int count(int64_t group) const { return (int)(first(group + 1) - first(group)); }
};
struct TileGroup {
  int count;
  Output to;
};

struct Plan {
  int batch = 0, height = 0, width = 0, threads = 0;
  int part = 0;                              // images that a thread takes through the front by itself; 0: threads share all
  std::vector<std::unique_ptr<Plan>> parts;  // the front of so many images, one a thread
  bool chosen = false;                       // algorithms were measured
  std::vector<Value> values;  // [0] is the image, [i + 1] node i
  std::vector<std::shared_ptr<Step>> steps;
  std::vector<Bytes> storage;
  Bytes shared;                              // Winograd's transformed input, where the threads share one
};

class Network {
 public:
  Network(const Kernels& isa, std::vector<NodeSpec> nodes, int image_channels);
  // images: float32 planes (batch, channels, height, width); out: float32, as many as out_shape says.
  void run(const float* images, int batch, int height, int width, int threads, const std::string& algorithm, float* out);
  std::vector<int64_t> out_shape(int batch, int height, int width);
  // One line a node: "node op algorithm direct_us winograd_us skipping_us multiply_adds", for a batch that has run.
  std::string describe(int batch, int height, int width);

 private:
  Plan* found(int batch, int height, int width, int threads = 0) const;  // null: none; threads 0: whatever many
  Plan& plan(int batch, int height, int width);
  int images_a_part(const Plan& plan) const;
  void make_values(Plan& plan) const;
  void allocate(Plan& plan, int first, int end) const;
  void make_step(Plan& plan, int node);
  int winograd_side(const Plan& plan, int node) const;
  std::shared_ptr<Panels> panels(int node, const Value& in);
  std::shared_ptr<Panels> winograd_panels(int node, const Value& in, int side);
  std::shared_ptr<SparsePanels> sparse_panels(int node, const Value& in, double least);
  void choose(Plan& plan, const std::string& algorithm);
  std::vector<double> time_nodes(Plan& plan);
  void measure(Plan& plan, const std::vector<Algorithm> (&algorithms)[2]);
  void run_part(Plan& plan, const float* images, int64_t part, Member& member);
  const Value* residual_of(const Plan& plan, int node) const { return nodes_[node].residual == kNone ? nullptr : &plan.values[nodes_[node].residual + 1]; }
  void run_image(Plan& plan, const float* images, Member& member);
  void run_node(Plan& plan, int node, Member& member);
  void run_direct(Plan& plan, int node, Member& member);
  void run_skipping(Plan& plan, int node, Member& member);
  void run_winograd(Plan& plan, int node, Member& member);
  void run_winograd_by_tiles(Plan& plan, int node, const TileGroups& tiles, Member& member);
  void run_winograd_by_channels(Plan& plan, int node, const TileGroups& tiles, Member& member);
  // Of one group, its tiles from ... end: transformed to v, where the whole group's input lies.
  void transform_tiles(const Plan& plan, int node, const TileGroups& tiles, int64_t group, int from, int end, uint8_t* v) const;
  void set_group(const Plan& plan, int node, const TileGroups& tiles, int64_t index, TileGroup& group) const;
  void multiply_tiles(const Plan& plan, int node, const TileGroups& tiles, TileGroup& group, int vector, const uint8_t* v) const;
  void run_max_pool(Plan& plan, int node, Member& member);
  void run_avg_pool(Plan& plan, int node, Member& member);
  uint8_t* scratch(int thread, size_t bytes);

  const Kernels& isa_;
  std::vector<NodeSpec> nodes_;
  int image_channels_;
  int front_;  // nodes before the first linear layer
  std::vector<std::unique_ptr<Plan>> plans_;  // the last used first
  std::map<std::vector<int>, std::shared_ptr<Panels>> packed_;  // by node, algorithm and input layout; shared by batch sizes
  std::map<std::vector<int>, std::shared_ptr<SparsePanels>> sparse_;            // by node and input layout; null: not worth it
  std::vector<Bytes> scratch_;                                                   // one a thread
  int threads_ = 1;
  std::mutex mutex_;
};

}  // namespace ternary
