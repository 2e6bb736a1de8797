#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace ternary {
namespace {

constexpr int kMostLanes = 16;   // of any instruction set: rows of scores are padded to whole vectors

}  // namespace

// A thread's room for a group of rows; both products of a layer's second half fit in the nearest caches.
struct Encoder::Scratch {
  Floats rows, wide, keys, scores, last, pixels, row_scale;
  Bytes codes, image_codes;
  int64_t image = -1;  // whose codes and scale are here
  float image_scale = 0;
};

Encoder::Encoder(const Kernels& isa, int heads, float epsilon, std::vector<EncoderLayer> layers, std::unique_ptr<Embedding> embedding, std::unique_ptr<Head> head)
    : isa_(isa), heads_(heads), width_(layers.empty() ? 0 : layers[0].qkv->k()), epsilon_(epsilon), layers_(std::move(layers)),
      embedding_(std::move(embedding)), head_(std::move(head)) {
  if (layers_.empty() || heads < 1 || width_ % (heads * kMostLanes)) throw std::invalid_argument("an encoder's heads are a multiple of 16 wide");
  constexpr size_t kMaxLayers = (kMaxPhases - 1) / 2;  // two phases a layer, and one at the end
  if (layers_.size() > kMaxLayers) throw std::invalid_argument("an encoder of more than " + std::to_string(kMaxLayers) + " layers does not fit in one parallel region");
  for (const EncoderLayer& l : layers_) {
    const bool fits = l.qkv->k() == width_ && l.qkv->n() == 3 * width_ && l.out->k() == width_ && l.out->n() == width_ && l.fc1->k() == width_ &&
                      l.fc2->k() == l.fc1->n() && l.fc2->n() == width_;
    const size_t w = width_;
    if (!fits || l.norm1_weight.size() != w || l.norm1_bias.size() != w || l.norm2_weight.size() != w || l.norm2_bias.size() != w)
      throw std::invalid_argument("the layers of an encoder do not fit together");
  }
  if (const Embedding* e = embedding_.get()) {
    const Patches& p = e->patches;
    const bool fits = e->linear->n() == width_ && e->linear->k() == p.channels * p.patch_height * p.patch_width && (int)e->mean.size() == p.channels &&
                      (int)e->std.size() == p.channels && (int64_t)e->positions.size() == (int64_t)(p.count() + 1) * width_;
    if (!fits) throw std::invalid_argument("the embedding of an encoder does not fit its layers");
  }
  if (head_ && (head_->linear->k() != width_ || (int)head_->norm_weight.size() != width_ || (int)head_->norm_bias.size() != width_))
    throw std::invalid_argument("the head of an encoder does not fit its layers");
}

Encoder::~Encoder() = default;

Encoder::Scratch Encoder::scratch(int tokens) const {
  size_t inner = 3 * width_, most = isa_.max_pixels, padded = (tokens + kMostLanes - 1) / kMostLanes * kMostLanes;
  for (const EncoderLayer& l : layers_) inner = std::max<size_t>(inner, l.fc1->n());
  if (embedding_) inner = std::max<size_t>(inner, embedding_->linear->k());
  Scratch s;
  s.rows.resize(most * width_), s.wide.resize(most * inner), s.row_scale.resize(most), s.codes.resize(most * (inner + 64) + 64);
  s.keys.resize(padded * (width_ / heads_)), s.scores.resize(padded * kMaxQueries), s.last.resize(most * width_);
  if (embedding_) s.pixels.resize(embedding_->patches.image()), s.image_codes.resize(embedding_->patches.image());
  return s;
}

void Encoder::run(const Call& call, int threads) {
  if (call.images == 0 || call.tokens == 0 || call.kept == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  threads = std::max(1, std::min(threads, kMaxThreads));
  // Images that a thread takes through all layers at a time: so many that their rows leave few places of the tiles empty.
  const int most = isa_.max_pixels;
  int64_t few = 1;
  while (few < 8 && (few * call.tokens + most - 1) / most * most * 4 > few * call.tokens * 5) few *= 2;
  const int64_t items = (call.images + few - 1) / few;
  const bool whole_images = call.images % (few * threads) == 0 || items >= 4 * threads;
  const int64_t image_floats = (int64_t)call.tokens * width_, room = (whole_images ? few * threads : call.images) * image_floats;
  const int64_t in_floats = call.embed ? embedding_->patches.image() : image_floats, out_floats = call.kept * (call.classify ? head_->linear->n() : width_);
  if (x_.size() < (size_t)room) qkv_.resize(3 * room), x_.resize(room);  // x_ last: it says that all are there
  if (scratch_tokens_ != call.tokens || (int)scratch_.size() < threads) {
    scratch_.clear();
    for (int t = 0; t < threads; ++t) scratch_.push_back(scratch(call.tokens));
    scratch_tokens_ = call.tokens;
  }
  parallel(isa_, threads, [&](Member& member) {
    Scratch& s = scratch_[member.index()];
    s.image = -1;
    if (!whole_images) return run_layers(member, {call, x_.data(), qkv_.data()}, s);
    const int64_t own = member.index() * few * image_floats;
    member.share(items, [&](int64_t item) {
      Member alone(0);
      s.image = -1;
      const int64_t i = item * few;
      const Call some = {call.in + i * in_floats, std::min(few, call.images - i), call.tokens, call.kept, call.embed, call.classify, call.out + i * out_floats};
      run_layers(alone, {some, x_.data() + own, qkv_.data() + 3 * own}, s);
    });
  });
}

void Encoder::run_layers(Member& member, const Images& of, Scratch& s) const {
  // work(first, count) for tiles of rows: as many as give every thread the same number: with 65 tokens and two threads, 12 and not 11.
  const auto each_tile = [&](int64_t rows, const auto& work) {
    const int64_t tiles = (rows + isa_.max_pixels - 1) / isa_.max_pixels, threads = member.team_size();
    const int64_t groups = (tiles + threads - 1) / threads * threads;
    member.share(groups, [&](int64_t group) {
      const int64_t first = group * rows / groups, end = (group + 1) * rows / groups;
      if (first < end) work(first, (int)(end - first));
    });
  };
  for (size_t l = 0; l < layers_.size(); ++l) {
    each_tile(of.images * of.tokens, [&](int64_t first, int rows) {
      float* const x = of.x + first * width_;
      if (l == 0 && of.embed) embed(of.in, first, rows, x, s);
      else if (l == 0) std::copy_n(of.in + first * width_, rows * width_, x);
      else finish(layers_[l - 1], of.qkv + 3 * first * width_, x, rows, s);
      project(layers_[l], x, rows, of.qkv + 3 * first * width_, s);
    });
    const int queries = l + 1 < layers_.size() ? of.tokens : of.kept;
    member.share(of.images * heads_, [&](int64_t item) {
      const int64_t image = item / heads_;
      attend((int)(item % heads_), of.qkv + 3 * image * of.tokens * width_, of.tokens, queries, s);
    });
  }
  each_tile(of.images * of.kept, [&](int64_t first, int rows) {
    float* const last = of.classify ? s.last.data() : of.out + first * width_;
    for (int p = 0; p < rows; ++p) {
      const int64_t row = (first + p) / of.kept * of.tokens + (first + p) % of.kept;
      std::copy_n(of.x + row * width_, width_, last + p * width_);
      std::copy_n(of.qkv + 3 * row * width_, width_, s.wide.data() + 3 * p * width_);
    }
    finish(layers_.back(), s.wide.data(), last, rows, s);
    if (!of.classify) return;
    normalize(last, rows, head_->norm_weight, head_->norm_bias, *head_->linear, s);
    head_->linear->multiply(s.codes.data(), s.row_scale.data(), rows, Then::kStore, of.out + first * head_->linear->n());
  });
}

void Encoder::embed(const float* images, int64_t first, int rows, float* x, Scratch& s) const {
  const Embedding& e = *embedding_;
  const Patches& patches = e.patches;
  const int tokens = patches.count() + 1;
  for (int p = 0, count; p < rows; p += count) {
    const int64_t image = (first + p) / tokens;
    const int token = (int)((first + p) % tokens), is_class = token == 0;
    count = std::min(rows - p, tokens - token);
    std::copy_n(e.positions.data() + (int64_t)token * width_, count * width_, x + p * width_);
    if (s.image != image) {
      const int64_t plane = (int64_t)patches.height * patches.width;
      for (int c = 0; c < patches.channels; ++c)
        for (int64_t i = c * plane; i < (c + 1) * plane; ++i) s.pixels[i] = (images[image * patches.image() + i] - e.mean[c]) / e.std[c];
      s.image_scale = isa_.quantize_row(s.pixels.data(), patches.image(), e.linear->code_max(), s.image_codes.data());
      s.image = image;
    }
    for (int row = is_class; row < count; ++row) {
      patches.row(token + row - 1, s.image_codes.data(), s.codes.data() + (row - is_class) * e.linear->stride());
      s.row_scale[row - is_class] = s.image_scale;
    }
    if (count > is_class) e.linear->multiply(s.codes.data(), s.row_scale.data(), count - is_class, Then::kAdd, x + (p + is_class) * width_);
  }
}

void Encoder::project(const EncoderLayer& l, const float* x, int rows, float* qkv, Scratch& s) const {
  normalize(x, rows, l.norm1_weight, l.norm1_bias, *l.qkv, s);
  l.qkv->multiply(s.codes.data(), s.row_scale.data(), rows, Then::kStore, qkv);
}

void Encoder::finish(const EncoderLayer& l, const float* attended, float* x, int rows, Scratch& s) const {
  quantize(attended, 3 * width_, rows, *l.out, s);
  l.out->multiply(s.codes.data(), s.row_scale.data(), rows, Then::kAdd, x);
  normalize(x, rows, l.norm2_weight, l.norm2_bias, *l.fc1, s);
  l.fc1->multiply(s.codes.data(), s.row_scale.data(), rows, Then::kGelu, s.wide.data());
  quantize(s.wide.data(), l.fc2->k(), rows, *l.fc2, s);
  l.fc2->multiply(s.codes.data(), s.row_scale.data(), rows, Then::kAdd, x);
}

void Encoder::normalize(const float* x, int rows, const std::vector<float>& weight, const std::vector<float>& bias, const Linear& next, Scratch& s) const {
  for (int p = 0; p < rows; ++p) isa_.layer_norm(x + p * width_, width_, weight.data(), bias.data(), epsilon_, s.rows.data() + p * width_);
  quantize(s.rows.data(), width_, rows, next, s);
}

void Encoder::quantize(const float* x, int64_t stride, int rows, const Linear& next, Scratch& s) const {
  for (int p = 0; p < rows; ++p) s.row_scale[p] = next.quantize(x + p * stride, s.codes.data() + p * next.stride());
}

void Encoder::attend(int head, float* qkv, int tokens, int queries, Scratch& s) const {
  const int dim = width_ / heads_;
  const int64_t stride = 3 * width_;
  float* const q = qkv + head * dim;
  isa_.transpose_keys(q + width_, stride, tokens, dim, s.keys.data());
  const Attention one_head = {q, q + width_, q + 2 * width_, s.keys.data(), stride, tokens, dim, 1.0f / std::sqrt((float)dim)};
  for (int first = 0; first < queries; first += kMaxQueries)
    isa_.attention(one_head, first, std::min(kMaxQueries, queries - first), s.scores.data(), q + first * stride, stride);
}

}  // namespace ternary
