#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace ternary {
namespace {

constexpr int kQueries = 16;     // rows of attention scores at a time
constexpr int kMostLanes = 16;   // of any instruction set: rows of scores are padded to whole vectors

}  // namespace

// A thread's room for a group of rows; both products of a layer's second half fit in the nearest caches.
struct Encoder::Scratch {
  std::vector<float> rows, wide, keys, scores;
  std::vector<uint8_t> codes;
  std::vector<float> row_scale;
};

Encoder::Encoder(const Kernels& isa, int heads, float epsilon, std::vector<EncoderLayer> layers)
    : isa_(isa), heads_(heads), width_(layers.empty() ? 0 : layers[0].qkv->k()), epsilon_(epsilon), layers_(std::move(layers)) {
  if (layers_.empty() || heads < 1 || width_ % (heads * kMostLanes)) throw std::invalid_argument("an encoder's heads are a multiple of 16 wide");
  for (const EncoderLayer& l : layers_) {
    const bool fits = l.qkv->k() == width_ && l.qkv->n() == 3 * width_ && l.out->k() == width_ && l.out->n() == width_ && l.fc1->k() == width_ &&
                      l.fc2->k() == l.fc1->n() && l.fc2->n() == width_;
    const size_t w = width_;
    if (!fits || l.norm1_weight.size() != w || l.norm1_bias.size() != w || l.norm2_weight.size() != w || l.norm2_bias.size() != w)
      throw std::invalid_argument("the layers of an encoder do not fit together");
  }
}

void Encoder::run(float* x, int64_t images, int tokens, int threads) {
  const int64_t rows = images * tokens;
  if (rows == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  qkv_.resize(std::max<size_t>(qkv_.size(), rows * 3 * width_));
  attended_.resize(std::max<size_t>(attended_.size(), rows * width_));
  int inner = 3 * width_;
  for (const EncoderLayer& l : layers_) inner = std::max(inner, l.fc1->n());
  const int most = isa_.max_pixels, padded = (tokens + kMostLanes - 1) / kMostLanes * kMostLanes;
  const int64_t groups = (rows + most - 1) / most;
  parallel(std::max(1, std::min(threads, kMaxThreads)), [&](Member& member) {
    Scratch s;
    s.rows.resize(most * width_), s.wide.resize((size_t)most * inner), s.row_scale.resize(most);
    s.codes.resize((size_t)most * (inner + 64) + 64);
    s.keys.resize((size_t)padded * (width_ / heads_)), s.scores.resize((size_t)padded * kQueries);
    for (size_t l = 0; l <= layers_.size(); ++l) {
      member.share(groups, [&](int64_t group) {
        const int64_t first = group * most;
        const int count = (int)std::min<int64_t>(most, rows - first);
        if (l > 0) finish(layers_[l - 1], x, first, count, s);
        if (l < layers_.size()) project(layers_[l], x, first, count, s);
      });
      if (l < layers_.size()) member.share(images * heads_, [&](int64_t item) { attend(item, tokens, s); });
    }
  });
}

// From hidden states to queries, keys and values.
void Encoder::project(const EncoderLayer& l, const float* x, int64_t first, int rows, Scratch& s) {
  for (int p = 0; p < rows; ++p) {
    isa_.layer_norm(x + (first + p) * width_, width_, l.norm1_weight.data(), l.norm1_bias.data(), epsilon_, s.rows.data());
    s.row_scale[p] = l.qkv->quantize(s.rows.data(), s.codes.data() + p * l.qkv->stride());
  }
  l.qkv->multiply(s.codes.data(), s.row_scale.data(), rows, qkv_.data() + first * 3 * width_);
}

// From what attention gave to the hidden states of the next layer.
void Encoder::finish(const EncoderLayer& l, float* x, int64_t first, int rows, Scratch& s) {
  float* const hidden = x + first * width_;
  const int inner = l.fc1->n();
  for (int p = 0; p < rows; ++p)
    s.row_scale[p] = l.out->quantize(attended_.data() + (first + p) * width_, s.codes.data() + p * l.out->stride());
  l.out->multiply(s.codes.data(), s.row_scale.data(), rows, s.rows.data());
  isa_.add_floats(s.rows.data(), rows * width_, hidden);
  for (int p = 0; p < rows; ++p) {
    isa_.layer_norm(hidden + p * width_, width_, l.norm2_weight.data(), l.norm2_bias.data(), epsilon_, s.rows.data());
    s.row_scale[p] = l.fc1->quantize(s.rows.data(), s.codes.data() + p * l.fc1->stride());
  }
  l.fc1->multiply(s.codes.data(), s.row_scale.data(), rows, s.wide.data());
  isa_.gelu(rows * inner, s.wide.data());
  for (int p = 0; p < rows; ++p) s.row_scale[p] = l.fc2->quantize(s.wide.data() + (int64_t)p * inner, s.codes.data() + p * l.fc2->stride());
  l.fc2->multiply(s.codes.data(), s.row_scale.data(), rows, s.rows.data());
  isa_.add_floats(s.rows.data(), rows * width_, hidden);
}

void Encoder::attend(int64_t item, int tokens, Scratch& s) {
  const int dim = width_ / heads_;
  const int64_t image = item / heads_, head = item % heads_, stride = 3 * width_;
  const float* q = qkv_.data() + image * tokens * stride + head * dim;
  isa_.transpose_keys(q + width_, stride, tokens, dim, s.keys.data());
  const Attention heads = {q, q + 2 * width_, s.keys.data(), stride, tokens, dim, 1.0f / std::sqrt((float)dim)};
  for (int first = 0; first < tokens; first += kQueries)
    isa_.attention(heads, first, std::min(kQueries, tokens - first), s.scores.data(), attended_.data() + (image * tokens + first) * width_ + head * dim, width_);
}

}  // namespace ternary
