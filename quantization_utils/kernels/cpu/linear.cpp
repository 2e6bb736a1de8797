#include "linear.h"

#include <algorithm>
#include <stdexcept>

namespace ternary {

Linear::Linear(const Kernels& isa, int n, int k, const int8_t* codes, const float* scale, const float* bias, bool is_ternary, int act_bits)
    : isa_(isa), n_(n), k_(k), stride_((k + 63) / 64 * 64), code_max_((1 << (act_bits - 1)) - 1), gain_(scale, scale + n), bias_(n, 0.0f) {
  if (k < 1) throw std::invalid_argument("a linear layer without inputs");
  if (bias) bias_.assign(bias, bias + n);
  const Weights kind = storage_of(is_ternary, k);
  if (k > most_inputs(kind)) throw std::invalid_argument("a linear layer with too many inputs for 32-bit accumulators");
  panels_ = pack_panels(isa, kind, n, 1, k, [&](int row, int, int i) { return codes[(int64_t)row * k + i]; });
  for (float& gain : gain_) gain *= unit_of(kind);  // a power of two: exact
  gain_.resize(panels_.init.size(), 0.0f), bias_.resize(panels_.init.size(), 0.0f);
  // Activations are stored as q + 128, so the accumulators start at -128 * sum(w), in the accumulators' unit.
  for (int row = 0; row < n; ++row) {
    int64_t sum = 0;
    for (int i = 0; i < k; ++i) sum += codes[(int64_t)row * k + i];
    panels_.init[row] = (int32_t)(-128 * sum * (kind == Weights::kTwoBit ? 64 : 1));
  }
}

// `blocks` blocks of channels, from `block` on; where the rows are and how many is left open.
Tile Linear::tile(int block, int blocks) const {
  Tile tile;
  tile.channels = std::min(blocks * panels_.block, n_ - block * panels_.block), tile.runs = 1, tile.groups = panels_.groups, tile.run_stride = 0;
  tile.weights = panels_.bytes.data() + block * panels_.block_bytes, tile.init = panels_.init.data() + block * panels_.block;
  return tile;
}

LinearOutput Linear::output(int block, const float* row_scale, Then then, float* out) const {
  const int first = block * panels_.block;
  return {gain_.data() + first, bias_.data() + first, row_scale, out + first, n_, then};
}

void Linear::multiply(const uint8_t* codes, const float* row_scale, int rows, Then then, float* out) const {
  Tile t = tile(0, blocks());
  t.count = rows;
  for (int p = 0; p < rows; ++p) t.pixels[p] = codes + (int64_t)p * stride_;
  isa_.multiply_rows(panels_.kind, t, output(0, row_scale, then, out));
}

static int at_most(int threads) { return std::clamp(threads, 1, kMaxThreads); }

void Linear::run(const float* x, int64_t rows, int threads, float* out) {
  const int64_t rows_an_item = std::max<int64_t>(1, 4096 / k_);
  run_rows(rows, (rows + rows_an_item - 1) / rows_an_item, threads, out, [&](int64_t item, int) {
    for (int64_t r = item * rows_an_item; r < std::min(rows, (item + 1) * rows_an_item); ++r)
      row_scale_[r] = quantize(x + r * k_, rows_.data() + r * stride_);
  });
}

void Linear::run_patches(const float* images, int64_t count, const Patches& p, int threads, float* out) {
  threads = at_most(threads);
  std::vector<uint8_t> codes_of_threads(threads * (int64_t)p.image());  // made here: memory that runs out there ends the process
  run_rows(count * p.count(), count, threads, out, [&](int64_t image, int thread) {
    uint8_t* const codes = codes_of_threads.data() + thread * (int64_t)p.image();
    const float scale = isa_.quantize_row(images + image * p.image(), p.image(), code_max_, codes);
    for (int patch = 0; patch < p.count(); ++patch) {
      const int64_t r = image * p.count() + patch;
      p.row(patch, codes, rows_.data() + r * stride_), row_scale_[r] = scale;
    }
  });
}

// quantize(item, number of the thread), for each of `items`: fills some of rows_ and row_scale_.
template <typename Quantize>
void Linear::run_rows(int64_t rows, int64_t items, int threads, float* out, const Quantize& quantize) {
  if (rows == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  threads = at_most(threads);
  const int blocks = this->blocks(), most = isa_.max_pixels;
  if ((int64_t)row_scale_.size() < rows) rows_.resize((rows + most) * stride_ + 64), row_scale_.resize(rows);
  const int64_t groups = (rows + most - 1) / most;
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(16, groups * blocks / (threads * 8)));
  parallel(isa_, threads, [&](Member& member) {
    member.share(items, [&](int64_t item) { quantize(item, member.index()); });
    member.share((groups + chunk - 1) / chunk * blocks, [&](int64_t item) {
      const int block = item % blocks;
      Tile t = tile(block, 1);
      const int64_t start = item / blocks * chunk * most, end = std::min(rows, start + chunk * most);
      for (int64_t m = start; m < end; m += t.count) {
        t.count = (int)std::min<int64_t>(most, end - m);
        for (int p = 0; p < t.count; ++p) t.pixels[p] = rows_.data() + (m + p) * stride_;
        isa_.multiply_rows(panels_.kind, t, output(block, row_scale_.data() + m, Then::kStore, out + m * n_));
      }
    });
  });
  constexpr size_t kKept = 32 << 20;  // bytes that may wait for the next call
  if (rows_.size() > kKept) Bytes().swap(rows_), row_scale_ = {};
}

}  // namespace ternary
