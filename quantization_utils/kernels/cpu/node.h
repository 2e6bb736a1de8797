// The nodes of a packed network, as Python hands them over, and the values between them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace ternary {

enum class Op : int { kConv, kLinear, kMaxPool, kAvgPool };
constexpr const char* kOpNames[] = {"conv", "linear", "max_pool", "avg_pool"};

constexpr int kImage = -1;  // the input that is no node

struct Node {
  Op op;
  int input;                    // of a node before this one, or kImage
  std::optional<int> residual;  // index of the node that is added
  bool ternary;
  bool relu;
  std::optional<int> out_max;   // largest code; none: float32
  float residual_gain;
  int n = 0, c = 0;             // channels out and in (a linear layer: c = its whole input)
  int kernel[2], stride[2], padding[2];
  std::vector<int8_t> codes;
  std::vector<float> gain, bias;
  std::vector<uint8_t> pad_values;  // empty: zeros
};

// What networks of any batch and image size have in common.
struct Model {
  const Kernels& isa;
  int image_channels;
  std::vector<Node> nodes;
};

// Throws std::invalid_argument: what a node is or reads that cannot be run.
[[noreturn]] void refuse(int node, const std::string& why);

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

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
  int64_t image_bytes() const { return image() * element_bytes(); }
  int64_t at(int y, int x) const { return (y + border) * row() + (int64_t)(x + border) * cs; }
  // `offset` elements (see `at`) into image `number` of the batch.
  uint8_t* element(int64_t number, int64_t offset) const { return data + (number * image() + offset) * element_bytes(); }
};

}  // namespace ternary
