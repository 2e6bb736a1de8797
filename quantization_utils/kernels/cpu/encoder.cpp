#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace ternary {
namespace {

constexpr int kQueries = 24;     // rows of attention scores at a time, a multiple of every instruction set's tile
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

Encoder::Scratch Encoder::scratch(int tokens) const {
  size_t inner = 3 * width_, most = isa_.max_pixels, padded = (tokens + kMostLanes - 1) / kMostLanes * kMostLanes;
  for (const EncoderLayer& l : layers_) inner = std::max<size_t>(inner, l.fc1->n());
  Scratch s;
  s.rows.resize(most * width_), s.wide.resize(most * inner), s.row_scale.resize(most), s.codes.resize(most * (inner + 64) + 64);
  s.keys.resize(padded * (width_ / heads_)), s.scores.resize(padded * kQueries);
  return s;
}

void Encoder::run(float* x, int64_t images, int tokens, int threads) {
  if (images == 0 || tokens == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  threads = std::max(1, std::min(threads, kMaxThreads));
  const int64_t image_rows = tokens, rows = images * image_rows;
  const bool whole_images = images % threads == 0 || images >= 4 * threads;
  const int64_t kept = whole_images ? threads * image_rows : rows;
  qkv_.resize(std::max<size_t>(qkv_.size(), kept * 3 * width_));
  attended_.resize(std::max<size_t>(attended_.size(), kept * width_));
  // As many groups of rows as give every thread the same number: with 65 tokens and two threads, 12 and not 11.
  const int64_t tiles = (rows + isa_.max_pixels - 1) / isa_.max_pixels, groups = (tiles + threads - 1) / threads * threads;
  const int64_t image_floats = image_rows * width_;
  parallel(threads, [&](Member& member) {
    Scratch s = scratch(tokens);
    if (whole_images) {
      float* const qkv = qkv_.data() + member.index() * 3 * image_floats;
      float* const attended = attended_.data() + member.index() * image_floats;
      member.share(images, [&](int64_t image) { run_image(x + image * image_floats, tokens, qkv, attended, s); });
      return;
    }
    for (size_t l = 0; l <= layers_.size(); ++l) {
      member.share(groups, [&](int64_t group) {
        const int64_t first = group * rows / groups, at = first * width_;
        const int count = (int)((group + 1) * rows / groups - first);
        if (l > 0) finish(layers_[l - 1], attended_.data() + at, x + at, count, s);
        if (l < layers_.size()) project(layers_[l], x + at, count, qkv_.data() + 3 * at, s);
      });
      if (l == layers_.size()) break;
      member.share(images * heads_, [&](int64_t item) {
        const int64_t at = item / heads_ * image_floats;
        attend((int)(item % heads_), qkv_.data() + 3 * at, tokens, attended_.data() + at, s);
      });
    }
  });
}

void Encoder::run_image(float* x, int tokens, float* qkv, float* attended, Scratch& s) const {
  const int most = isa_.max_pixels;
  for (size_t l = 0; l <= layers_.size(); ++l) {
    for (int first = 0; first < tokens; first += most) {
      const int64_t at = (int64_t)first * width_;
      const int count = std::min(most, tokens - first);
      if (l > 0) finish(layers_[l - 1], attended + at, x + at, count, s);
      if (l < layers_.size()) project(layers_[l], x + at, count, qkv + 3 * at, s);
    }
    if (l < layers_.size())
      for (int head = 0; head < heads_; ++head) attend(head, qkv, tokens, attended, s);
  }
}

void Encoder::project(const EncoderLayer& l, const float* x, int rows, float* qkv, Scratch& s) const {
  for (int p = 0; p < rows; ++p) {
    isa_.layer_norm(x + p * width_, width_, l.norm1_weight.data(), l.norm1_bias.data(), epsilon_, s.rows.data());
    s.row_scale[p] = l.qkv->quantize(s.rows.data(), s.codes.data() + p * l.qkv->stride());
  }
  l.qkv->multiply(s.codes.data(), s.row_scale.data(), rows, qkv);
}

void Encoder::finish(const EncoderLayer& l, const float* attended, float* x, int rows, Scratch& s) const {
  const int inner = l.fc1->n();
  for (int p = 0; p < rows; ++p) s.row_scale[p] = l.out->quantize(attended + p * width_, s.codes.data() + p * l.out->stride());
  l.out->multiply(s.codes.data(), s.row_scale.data(), rows, s.rows.data());
  isa_.add_floats(s.rows.data(), rows * width_, x);
  for (int p = 0; p < rows; ++p) {
    isa_.layer_norm(x + p * width_, width_, l.norm2_weight.data(), l.norm2_bias.data(), epsilon_, s.rows.data());
    s.row_scale[p] = l.fc1->quantize(s.rows.data(), s.codes.data() + p * l.fc1->stride());
  }
  l.fc1->multiply(s.codes.data(), s.row_scale.data(), rows, s.wide.data());
  isa_.gelu(rows * inner, s.wide.data());
  for (int p = 0; p < rows; ++p) s.row_scale[p] = l.fc2->quantize(s.wide.data() + (int64_t)p * inner, s.codes.data() + p * l.fc2->stride());
  l.fc2->multiply(s.codes.data(), s.row_scale.data(), rows, s.rows.data());
  isa_.add_floats(s.rows.data(), rows * width_, x);
}

void Encoder::attend(int head, const float* qkv, int tokens, float* attended, Scratch& s) const {
  const int dim = width_ / heads_;
  const int64_t stride = 3 * width_;
  const float* q = qkv + head * dim;
  isa_.transpose_keys(q + width_, stride, tokens, dim, s.keys.data());
  const Attention one_head = {q, q + 2 * width_, s.keys.data(), stride, tokens, dim, 1.0f / std::sqrt((float)dim)};
  for (int first = 0; first < tokens; first += kQueries)
    isa_.attention(one_head, first, std::min(kQueries, tokens - first), s.scores.data(), attended + (int64_t)first * width_ + head * dim, width_);
}

}  // namespace ternary
