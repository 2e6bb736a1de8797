// A transformer encoder (pre-norm, as in ViT) in one parallel region: float32 hidden states in and out, every product of
// activations and weights in integers with activations quantized per token.
//
//   x += out(attention(qkv(LN1(x))));  x += fc2(gelu(fc1(LN2(x))))
//
// A few rows go through everything between two attentions while they lie in the nearest cache; only attention needs all
// rows of an image, so a layer has two phases.
#pragma once
#include <memory>
#include <vector>

#include "linear.h"

namespace ternary {

struct EncoderLayer {
  std::vector<float> norm1_weight, norm1_bias, norm2_weight, norm2_bias;
  std::shared_ptr<Linear> qkv, out, fc1, fc2;  // qkv: queries, keys and values of all heads, one after the other
};

class Encoder {
 public:
  Encoder(const Kernels& isa, int heads, float epsilon, std::vector<EncoderLayer> layers);
  // x: images x tokens x width, in place
  void run(float* x, int64_t images, int tokens, int threads);
  int width() const { return width_; }

 private:
  struct Scratch;  // of a thread
  void project(const EncoderLayer& layer, const float* x, int64_t first, int rows, Scratch& s);
  void finish(const EncoderLayer& layer, float* x, int64_t first, int rows, Scratch& s);
  void attend(int64_t item, int tokens, Scratch& s);
  const Kernels& isa_;
  int heads_, width_;
  float epsilon_;
  std::vector<EncoderLayer> layers_;
  std::vector<float> qkv_, attended_;  // of all rows
  std::mutex mutex_;
};

}  // namespace ternary
