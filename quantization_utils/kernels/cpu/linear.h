// A linear layer with activations quantized per token (signed, scale from the row): float32 in, float32 out.
#pragma once
#include <mutex>

#include "panels.h"
#include "threads.h"

namespace ternary {

// Images, planes of height x width, as rows of patches side by side; what is left over at the lower and right edges is no row.
struct Patches {
  int channels, height, width, patch_height, patch_width;
  int count() const { return (height / patch_height) * (width / patch_width); }
  int64_t image() const { return (int64_t)channels * height * width; }
  // The row of one patch, channel by channel, of an image's codes.
  void row(int patch, const uint8_t* codes, uint8_t* to) const {
    const int across = width / patch_width;
    const uint8_t* from = codes + (int64_t)patch / across * patch_height * width + patch % across * patch_width;
    for (int c = 0; c < channels; ++c, from += (int64_t)height * width)
      for (int y = 0; y < patch_height; ++y, to += patch_width) std::copy_n(from + (int64_t)y * width, patch_width, to);
  }
};

class Linear {
 public:
  Linear(const Kernels& isa, int n, int k, const int8_t* codes, const float* scale, const float* bias, bool is_ternary, int act_bits);
  // x: rows x k, out: rows x n
  void run(const float* x, int64_t rows, int threads, float* out);
  // A convolution whose kernel is also its stride: `count` images with one scale each, out: count x patches x n.
  void run_patches(const float* images, int64_t count, const Patches& patches, int threads, float* out);
  // Rows whose codes (of `quantize`) stand stride() bytes apart, at most isa.max_pixels, for so many of which there is room; all
  // channels, rows of out n() apart.
  void multiply(const uint8_t* codes, const float* row_scale, int rows, Then then, float* out) const;
  float quantize(const float* x, uint8_t* codes) const { return isa_.quantize_row(x, k_, code_max_, codes); }
  int n() const { return n_; }
  int k() const { return k_; }
  int stride() const { return stride_; }
  int code_max() const { return code_max_; }

 private:
  template <typename Quantize>
  void run_rows(int64_t rows, int64_t items, int threads, float* out, const Quantize& quantize);
  int blocks() const { return (n_ + panels_.block - 1) / panels_.block; }
  Tile tile(int block, int blocks) const;
  LinearOutput output(int block, const float* row_scale, Then then, float* out) const;
  const Kernels& isa_;
  int n_, k_, stride_, code_max_;
  Panels panels_;
  std::vector<float> gain_, bias_, row_scale_;
  Bytes rows_;
  std::mutex mutex_;
};

}  // namespace ternary
