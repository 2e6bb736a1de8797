// A linear layer with activations quantized per token (signed, scale from the row): float32 in, float32 out.
#pragma once
#include <mutex>

#include "network.h"

namespace ternary {

class Linear {
 public:
  Linear(const Kernels& isa, int n, int k, const int8_t* codes, const float* scale, const float* bias, bool is_ternary, int act_bits);
  // x: rows x k, out: rows x n
  void run(const float* x, int64_t rows, int threads, float* out);
  // Rows whose codes (of `quantize`) stand stride() bytes apart, at most isa.max_pixels; all channels, rows of out n() apart.
  enum class Then { kStore, kGelu, kAdd };  // kAdd: to what is in out
  void multiply(const uint8_t* codes, const float* row_scale, int rows, Then then, float* out) const;
  float quantize(const float* x, uint8_t* codes) const { return isa_.quantize_row(x, k_, code_max_, codes); }
  int n() const { return n_; }
  int k() const { return k_; }
  int stride() const { return stride_; }

 private:
  Tile tile(int block) const;
  void finish(const Tile& tile, int block, const int32_t* acc, const float* row_scale, Then then, float* out) const;
  const Kernels& isa_;
  int n_, k_, stride_, code_max_;
  Panels panels_;
  std::vector<float> scale_, bias_, row_scale_;
  std::vector<uint8_t> rows_;
  std::mutex mutex_;
};

}  // namespace ternary
