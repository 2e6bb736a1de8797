#include "panels.h"

namespace ternary {
namespace {

// The nine numbers v of one 3x3 kernel, and U, as kernels.h has them (U of stride 2 doubled).
void transform_kernel(int side, const int8_t* g, int (&v)[3][3], int (&u)[5][5]) {
  static const int stride1[3][3] = {{2, 0, 0}, {1, 1, 1}, {0, 0, 2}};
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3; ++b) {
      v[a][b] = side == 4 ? 0 : 2 * g[a * 3 + b];
      for (int i = 0; side == 4 && i < 9; ++i) v[a][b] += stride1[a][i / 3] * g[i] * stride1[b][i % 3];
    }
  static const int rows4[4][3] = {{1, 0, 0}, {0, 1, 0}, {1, -1, 1}, {0, 0, 1}};
  static const int rows5[5][3] = {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}, {0, 1, 0}};
  const int(*rows)[3] = side == 4 ? rows4 : rows5;
  for (int i = 0; i < side; ++i)
    for (int j = 0; j < side; ++j) {
      u[i][j] = 0;
      for (int k = 0; k < 9; ++k) u[i][j] += rows[i][k / 3] * v[k / 3][k % 3] * rows[j][k % 3];
    }
}

}  // namespace

std::shared_ptr<const Panels> PackedWeights::winograd(int node, const Value& in, int side) {
  auto& slot = panels_[{node, side, in.cs}];
  if (!slot) slot = std::make_shared<Panels>(side == 6 ? wide(model_.nodes[node], in) : narrow(model_.nodes[node], in, side));
  return slot;
}

// Of side 6: U, [vector][column][pair of channels][row][lane][channel].
Panels PackedWeights::wide(const Node& s, const Value& in) const {
  static const int g[6][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};
  const int lanes = model_.isa.lanes, vectors = (s.n + lanes - 1) / lanes;
  Panels p;
  p.kind = Weights::kSmall, p.groups = in.cs / 2, p.block = lanes;
  p.block_bytes = (int64_t)36 * in.cs * lanes;
  p.bytes.assign(vectors * p.block_bytes, 0);
  p.init.resize((size_t)vectors * lanes);
  for (int n = 0; n < s.n; ++n)
    for (int c = 0; c < s.c; ++c) {
      const int8_t* const kernel = s.codes.data() + ((size_t)n * s.c + c) * 9;
      uint8_t* const to = p.bytes.data() + n / lanes * p.block_bytes + (int64_t)c / 2 * 6 * lanes * 2 + n % lanes * 2 + c % 2;
      for (int i = 0; i < 6; ++i) {
        int row[3];
        for (int x = 0; x < 3; ++x) row[x] = g[i][0] * kernel[x] + g[i][1] * kernel[3 + x] + g[i][2] * kernel[6 + x];
        for (int j = 0; j < 6; ++j) to[((int64_t)j * p.groups * 6 + i) * lanes * 2] = (uint8_t)(row[0] * g[j][0] + row[1] * g[j][1] + row[2] * g[j][2]);
      }
    }
  return p;
}

// Of sides 4 and 5: kernels.h has the order of the bytes.
Panels PackedWeights::narrow(const Node& s, const Value& in, int side) const {
  Panels p;
  const int lanes = model_.isa.lanes, vectors = (s.n + lanes - 1) / lanes, bytes = model_.isa.winograd_bytes;
  p.kind = Weights::kSmall, p.groups = in.cs / 4, p.block = lanes;
  p.block_bytes = (int64_t)bytes * in.cs * lanes;
  p.bytes.assign(vectors * p.block_bytes, 0);
  p.init.resize((size_t)vectors * lanes);
  for (int n = 0; n < s.n; ++n) {
    for (int c = 0; c < in.cs; ++c) {
      int v[3][3] = {}, u[5][5] = {};
      if (c < s.c) transform_kernel(side, s.codes.data() + ((size_t)n * s.c + c) * 9, v, u);
      auto byte = [&](int a, int b) { return (uint8_t)(kWinogradOffset + v[a][b]); };
      auto pair = [&](int a, int b, int c, int d) { return (uint8_t)(byte(a, b) / 2 + byte(c, d) / 2 * 16); };
      const uint8_t five[] = {pair(0, 0, 2, 0), pair(0, 2, 2, 2), pair(1, 0, 1, 2), pair(0, 1, 2, 1), byte(1, 1)};
      const uint8_t nine[] = {byte(0, 0), byte(1, 0), byte(2, 0), byte(0, 1), byte(1, 1), byte(2, 1), byte(0, 2), byte(1, 2), byte(2, 2)};
      uint8_t* to = p.bytes.data() + n / lanes * p.block_bytes + (int64_t)c / 4 * bytes * lanes * 4 + n % lanes * 4 + c % 4;
      for (int i = 0; i < bytes; ++i) to[i * lanes * 4] = bytes == 5 ? five[i] : nine[i];
      p.init[n] += 128 * (kWinogradOffset + u[1][1]);  // used where there is an offset
    }
  }
  return p;
}

void PackedWeights::forget_unused() {
  std::erase_if(panels_, [](const auto& entry) { return entry.second.use_count() == 1; });
  std::erase_if(sparse_, [](const auto& entry) { return entry.second.use_count() == 1; });
}

std::shared_ptr<const Panels> PackedWeights::direct(int node, const Value& in) {
  const Node& s = model_.nodes[node];
  const bool linear = s.op == Op::kLinear;
  const int kh = linear ? in.h : s.kernel[0], kw = linear ? in.w : s.kernel[1], c = linear ? in.c : s.c;
  auto& slot = panels_[{node, kh, kw, in.cs}];
  if (slot) return slot;
  const int64_t k = (int64_t)kh * kw * c;
  Weights kind = storage_of(s.ternary, k);
  // Signed bytes also where a run leaves a quarter of a group or more empty, as three colours do: fewer multiply-adds.
  if (s.ternary && kw * in.cs <= 12) kind = Weights::kSmall;
  if (k > most_inputs(kind)) refuse(node, "has too many inputs for 32-bit accumulators");
  slot = std::make_shared<Panels>(pack_panels(model_.isa, kind, s.n, kh, kw * in.cs, [&](int n, int run, int i) {
    const int x = i / in.cs, ch = i % in.cs;
    return ch < c ? s.codes[(((size_t)n * c + ch) * kh + run) * kw + x] : 0;
  }));
  return slot;
}

std::shared_ptr<const SparsePanels> PackedWeights::skipping(int node, const Value& in, double least) {
  const Node& s = model_.nodes[node];
  if (s.op != Op::kLinear || !s.ternary || s.c > most_inputs(Weights::kTwoBit)) return nullptr;
  const std::vector<int> key = {node, in.h, in.w, in.cs};
  if (const auto known = sparse_.find(key); known != sparse_.end()) return known->second;
  auto sparse = std::make_shared<SparsePanels>();
  SparsePanels& p = *sparse;
  const int lanes = model_.isa.lanes, vectors = (s.n + lanes - 1) / lanes, plane = in.h * in.w;
  p.runs = in.h, p.words = (in.w * in.cs + 63) / 64;
  p.used.assign((size_t)vectors * p.runs * p.words, 0);
  std::vector<std::vector<int>> inputs(vectors);  // columns of the codes, in the order in which activations lie
  int64_t blocks = 0;
  for (int v = 0; v < vectors; ++v) {
    const int first = v * lanes, count = std::min(lanes, s.n - first);
    std::vector<uint8_t> is_read(s.c, 0);
    for (int n = first; n < first + count; ++n)
      for (int i = 0; i < s.c; ++i) is_read[i] |= s.codes[(size_t)n * s.c + i] != 0;
    for (int y = 0; y < in.h; ++y)
      for (int x = 0; x < in.w; ++x)
        for (int c = 0; c < in.c; ++c) {
          const int column = c * plane + y * in.w + x, bit = x * in.cs + c;
          if (!is_read[column]) continue;
          inputs[v].push_back(column);
          p.used[((size_t)v * p.runs + y) * p.words + bit / 64] |= (uint64_t)1 << bit % 64;
        }
    blocks += inputs[v].size();
  }
  if (blocks > (1 - least) * vectors * s.c) return sparse_[key] = nullptr;
  for (int v = 0; v < vectors; ++v) {
    const Panels dense = pack_panels(model_.isa, Weights::kTwoBit, std::min(lanes, s.n - v * lanes), 1, (int)inputs[v].size(),
                                     [&](int n, int, int i) { return s.codes[(size_t)(v * lanes + n) * s.c + inputs[v][i]]; });
    p.parts.push_back({(int64_t)p.bytes.size(), dense.groups});
    p.bytes.insert(p.bytes.end(), dense.bytes.begin(), dense.bytes.begin() + (int64_t)dense.groups * lanes * 4);
  }
  p.bytes.resize(p.bytes.size() + 64);  // tiles of two vectors read as far beyond one
  return sparse_[key] = sparse;  // now that it is whole
}

}  // namespace ternary
