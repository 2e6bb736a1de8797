// A transformer encoder (pre-norm, as in ViT) in one parallel region: float32 hidden states in and out, every product of
// activations and weights in integers with activations quantized per token.
//
//   x += out(attention(qkv(LN1(x))));  x += fc2(gelu(fc1(LN2(x))))
//
// A few rows go through everything between two attentions while they lie in the nearest cache. Only attention needs all rows of
// an image: with many images, each thread takes whole ones through all layers; with few, all threads share an image's rows,
// and a layer has two phases. The results are the same, bit for bit. Of a classifier's last layer only the class token is used
// later: what no other token reads any more is not computed (but for queries). Patches become tokens as the first layer takes
// them, and the class token goes through the last norm and the classifier where it lies: between operators of PyTorch, whose code
// the weights of the layers have driven from the caches, these few steps take as long as a layer.
#pragma once
#include <memory>
#include <vector>

#include "linear.h"

namespace ternary {

struct EncoderLayer {
  std::vector<float> norm1_weight, norm1_bias, norm2_weight, norm2_bias;
  std::shared_ptr<Linear> qkv, out, fc1, fc2;  // qkv: queries, keys and values of all heads, one after the other
};

// From images to hidden states: ((pixel - mean) / std), quantized per image, patches through a linear layer, positions added.
struct Embedding {
  Patches patches;
  std::vector<float> mean, std;   // of each channel
  std::vector<float> positions;   // tokens x width; the class token is part of the first row
  std::shared_ptr<Linear> linear;
};

// From a hidden state to logits.
struct Head {
  std::vector<float> norm_weight, norm_bias;
  std::shared_ptr<Linear> linear;
};

class Encoder {
 public:
  // embedding, head: null where images come, or logits go, another way.
  Encoder(const Kernels& isa, int heads, float epsilon, std::vector<EncoderLayer> layers, std::unique_ptr<Embedding> embedding, std::unique_ptr<Head> head);
  ~Encoder();
  struct Call {
    const float* in;          // images x tokens x width hidden states; images to embed, planes of pixels in [0, 1]
    int64_t images;
    int tokens, kept;         // the first `kept` tokens of each image are what comes out
    bool embed, classify;
    float* out;               // images x kept x width hidden states, or logits of each
  };
  void run(const Call& call, int threads);
  int width() const { return width_; }
  const Embedding* embedding() const { return embedding_.get(); }
  const Head* head() const { return head_.get(); }

 private:
  struct Scratch;  // of a thread
  struct Images : Call {
    float *x, *qkv;
  };
  Scratch scratch(int tokens) const;
  void run_layers(Member& member, const Images& of, Scratch& s) const;
  // Rows first ... first + rows - 1 of all images' tokens.
  void embed(const float* images, int64_t first, int rows, float* x, Scratch& s) const;
  // `rows` rows of one tile: x (rows x width) to qkv (rows x 3 width), and what attention left in the first third of these to x.
  void project(const EncoderLayer& layer, const float* x, int rows, float* qkv, Scratch& s) const;
  void finish(const EncoderLayer& layer, const float* attended, float* x, int rows, Scratch& s) const;
  // The scratch's codes and row_scale for the layer that takes them next, of x and of its LayerNorm.
  void quantize(const float* x, int64_t stride, int rows, const Linear& next, Scratch& s) const;
  void normalize(const float* x, int rows, const std::vector<float>& weight, const std::vector<float>& bias, const Linear& next, Scratch& s) const;
  // The first `queries` tokens of one image and one head: what they attend to, in the place of the queries.
  void attend(int head, float* qkv, int tokens, int queries, Scratch& s) const;
  const Kernels& isa_;
  int heads_, width_;
  float epsilon_;
  std::vector<EncoderLayer> layers_;
  std::unique_ptr<Embedding> embedding_;
  std::unique_ptr<Head> head_;
  Floats x_, qkv_;                // of all rows, or of an image of each thread
  std::vector<Scratch> scratch_;  // one a thread, for scratch_tokens_
  int scratch_tokens_ = 0;
  std::mutex mutex_;
};

}  // namespace ternary
