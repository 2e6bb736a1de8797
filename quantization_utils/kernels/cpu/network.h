// A packed network: its nodes, and a plan for each batch and image size that has run lately.
#pragma once
#include <list>
#include <mutex>
#include <string>
#include <vector>

#include "run.h"

namespace ternary {

class Network {
 public:
  // algorithm: how nodes are computed that have a choice, "auto", "direct", "winograd" or "skipping".
  Network(const Kernels& isa, std::string algorithm, int image_channels);
  // The next node, before the network runs for the first time. Throws std::invalid_argument, as the others do: why it can't be run.
  void add(Node node);
  // images: float32 planes (batch, channels, height, width); out: float32, as many as out_shape says.
  void run(const float* images, int batch, int height, int width, int threads, float* out);
  std::vector<int64_t> out_shape(int batch, int height, int width);
  // One line a node: "node op algorithm direct_us winograd_us skipping_us multiply_adds images", for a batch that has run.
  std::string describe(int batch, int height, int width);
  int image_channels() const { return model_.image_channels; }

 private:
  std::list<Plan>::iterator find(int batch, int height, int width, int threads);  // threads 0: whatever many
  Plan& plan(int batch, int height, int width, int threads);

  Model model_;
  const std::string algorithm_;
  PackedWeights weights_{model_};
  std::list<Plan> plans_;       // the last used first
  std::vector<Bytes> scratch_;  // one a thread
  std::mutex mutex_;
};

}  // namespace ternary
