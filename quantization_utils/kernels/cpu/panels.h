// Weights in the orders in which the kernels read them.
#pragma once
#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "memory.h"
#include "node.h"

namespace ternary {

// In the order the tiles read them, for blocks of `block` channels.
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
  const int padded = round_up(n, isa.lanes);
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

// The weights of a model's nodes: packed when they are first asked for, and then shared by all batch sizes whose values lie alike.
class PackedWeights {
 public:
  explicit PackedWeights(const Model& model) : model_(model) {}
  std::shared_ptr<const Panels> direct(int node, const Value& in);
  std::shared_ptr<const Panels> winograd(int node, const Value& in, int side);
  void forget_unused();  // what no plan holds
  // null: of the blocks of one input and a vector of channels, fewer than `least` (a fraction) are zero.
  std::shared_ptr<const SparsePanels> skipping(int node, const Value& in, double least);

 private:
  Panels narrow(const Node& s, const Value& in, int side) const;
  Panels wide(const Node& s, const Value& in) const;
  const Model& model_;
  std::map<std::vector<int>, std::shared_ptr<const Panels>> panels_;        // by node, algorithm and input layout
  std::map<std::vector<int>, std::shared_ptr<const SparsePanels>> sparse_;  // by node and input layout; null: not worth it
};

}  // namespace ternary
