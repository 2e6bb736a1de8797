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
  int n() const { return n_; }
  int k() const { return k_; }

 private:
  const Kernels& isa_;
  int n_, k_, stride_, code_max_;
  Panels panels_;
  std::vector<float> scale_, bias_, row_scale_;
  std::vector<uint8_t> rows_;
  std::mutex mutex_;
};

}  // namespace ternary
