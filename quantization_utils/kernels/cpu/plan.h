// What one batch size, image size and number of threads need to run: where values lie, and how each node is computed.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "panels.h"

namespace ternary {

enum class Algorithm : int { kDirect, kWinograd, kSkipping, kPool };
constexpr const char* kAlgorithmNames[] = {"direct", "winograd", "skipping", "pool"};
constexpr int kAlgorithms = 4;

// How one node is computed.
struct Step {
  Algorithm algorithm = Algorithm::kPool;
  int winograd_side = 0;                     // 4, 5 or 6 (kernels.h); 0: not possible
  std::shared_ptr<const Panels> direct, winograd;
  std::shared_ptr<const SparsePanels> sparse;
  Epilogue epilogue{};
  std::vector<float> gain, bias;             // padded to whole blocks
  std::vector<int64_t> in_offset, out_offset, residual_offset;  // per output pixel of one image, in bytes
  double micros[kAlgorithms] = {};           // measured at planning, of each algorithm

  // Of accumulators of the channels from `first` on, which count `unit` each.
  Epilogue epilogue_from(int64_t first, float unit) const {
    Epilogue e = epilogue;
    e.gain = gain.data() + first, e.bias = bias.data() + first, e.unit = unit;
    return e;
  }
};

// Values [0], the image, and [i + 1], of node i, and the memory of some of them.
struct Buffers {
  std::vector<Value> values;
  std::vector<Bytes> storage;
};

// Nodes first ... end - 1, of which later nodes read the last one's value only.
struct Stage {
  int first, end;
  int part = 0;                // images that a thread takes through them by itself; 0: all threads share each node
  std::vector<Buffers> parts;  // one a thread: their values for so many images; what stages hand on lies in the plan's whole ones
};

struct Plan {
  int batch, height, width, threads;
  std::vector<Step> steps;    // of each node
  std::vector<Stage> stages;
  Buffers whole;              // of the batch: what stages hand on, and all values of stages that threads share
  Bytes shared;               // Winograd's transformed input, where the threads share one
};

// Makes a thread's buffers those of one part: returns the number of its first image.
int64_t enter_part(const Plan& plan, const Stage& stage, int64_t part, Buffers& own);

// The values of a batch of images without memory for them.
std::vector<Value> shapes(const Model& model, int batch, int height, int width);

// Every node as its plain algorithm.
Plan make_plan(const Model& model, PackedWeights& weights, int batch, int height, int width, int threads);

// Gives every node of a new plan the algorithm asked for where it can have it; of "auto", the one that is faster here and now.
void choose_algorithms(const Model& model, PackedWeights& weights, const std::string& algorithm, std::vector<Bytes>& scratch, Plan& plan);

}  // namespace ternary
