// Running a planned network: one parallel region, one or two shared phases a node.
#include <cstring>

#include "network.h"

namespace ternary {
namespace {

// Items a thread should find per phase, so that an uneven finish costs little.
constexpr int kItemsPerThread = 6;

int64_t team_chunk(int64_t groups, int blocks, int threads, int64_t most) {
  const int64_t wanted = (int64_t)threads * kItemsPerThread;
  return std::max<int64_t>(1, std::min(most, groups * blocks / wanted));
}

}  // namespace

void Network::run(const float* images, int batch, int height, int width, int threads, const std::string& algorithm, float* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  Plan& p = plan(batch, height, width);
  threads = std::max(1, std::min(threads, 256));
  if ((int)scratch_.size() < threads) scratch_.resize(threads);
  threads_ = threads;
  if (!p.chosen) choose(p, threads, algorithm);
  p.chosen = true;
  parallel(threads, [&](Member& member) {
    run_image(p, images, member);
    for (size_t i = 0; i < nodes_.size(); ++i) run_node(p, (int)i, member);
  });
  const Value& last = p.values.back();
  for (int b = 0; b < last.n; ++b)
    for (int y = 0; y < last.h; ++y)
      for (int x = 0; x < last.w; ++x)
        for (int c = 0; c < last.c; ++c) {
          const int64_t from = b * last.image() + last.at(y, x) + c;
          const float value = last.is_float ? ((const float*)last.data)[from] : (float)last.data[from];
          out[((int64_t)(b * last.c + c) * last.h + y) * last.w + x] = value;
        }
}

uint8_t* Network::scratch(int thread, size_t bytes) {
  auto& buffer = scratch_[thread];
  if (buffer.size() < bytes + 64) buffer.resize(bytes + 64);
  return buffer.data() + (64 - (uintptr_t)buffer.data() % 64);
}

void Network::run_image(Plan& plan, const float* images, Member& member) {
  const Value& v = plan.values[0];
  const int64_t plane = (int64_t)v.h * v.w;
  const int rows = 4;  // a row is too little for an item
  const int per_image = (v.h + rows - 1) / rows;
  member.share((int64_t)v.n * per_image, [&](int64_t item) {
    const int b = item / per_image, first = item % per_image * rows;
    std::vector<const float*> planes(v.c);
    for (int y = first; y < std::min(first + rows, v.h); ++y) {
      for (int c = 0; c < v.c; ++c) planes[c] = images + ((int64_t)b * v.c + c) * plane + (int64_t)y * v.w;
      isa_.image_row(planes.data(), v.c, v.w, v.data + b * v.image() + v.at(y, 0), v.cs);
    }
  });
}

void Network::run_node(Plan& plan, int node, Member& member) {
  switch (nodes_[node].op) {
    case Op::kMaxPool: return run_max_pool(plan, node, member);
    case Op::kAvgPool: return run_avg_pool(plan, node, member);
    default: break;
  }
  if (plan.steps[node]->algorithm == Algorithm::kWinograd) return run_winograd(plan, node, member);
  run_direct(plan, node, member);
}

void Network::run_direct(Plan& plan, int node, Member& member) {
  const NodeSpec& s = nodes_[node];
  const Step& step = *plan.steps[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  const Value* residual = s.residual != kNone ? &plan.values[s.residual + 1] : nullptr;
  const Panels& panels = *step.direct;
  const int block = panels.block, blocks = (s.n + block - 1) / block, most = isa_.max_pixels;
  const int per_image = out.h * out.w;
  const int64_t pixels = (int64_t)per_image * in.n, groups = (pixels + most - 1) / most;
  const int64_t chunk = team_chunk(groups, blocks, threads_, 16);
  member.share((groups + chunk - 1) / chunk * blocks, [&](int64_t item) {
    const int first_channel = item % blocks * block;
    alignas(64) int32_t acc[kMaxPixels * kMaxChannels];
    Tile tile;
    tile.channels = std::min(block, s.n - first_channel);
    tile.runs = panels.runs, tile.groups = panels.groups, tile.run_stride = in.row();
    tile.weights = panels.bytes.data() + first_channel / block * panels.block_bytes;
    tile.init = panels.init.data() + first_channel;
    Epilogue epilogue = step.epilogue;
    epilogue.gain = step.gain.data() + first_channel, epilogue.bias = step.bias.data() + first_channel;
    epilogue.shift = panels.kind == Weights::kTwoBit ? 6 : 0;
    Output to;
    to.has_row_scale = false, to.has_residual = residual != nullptr, to.residual_is_float = residual && residual->is_float;
    const int64_t start = item / blocks * chunk * most, end = std::min(pixels, start + chunk * most);
    for (int64_t m = start; m < end; m += tile.count) {
      tile.count = (int)std::min<int64_t>(most, end - m);
      for (int p = 0; p < tile.count; ++p) {
        const int64_t image = (m + p) / per_image, pixel = (m + p) % per_image;
        tile.pixels[p] = in.data + image * in.image() + step.in_offset[pixel];
        to.out[p] = out.data + (image * out.image() + step.out_offset[pixel] + first_channel) * (out.is_float ? 4 : 1);
        if (residual)
          to.residual[p] = residual->data + (image * residual->image() + step.residual_offset[pixel] + first_channel) * (residual->is_float ? 4 : 1);
      }
      isa_.multiply(panels.kind, tile, acc);
      isa_.finish(epilogue, to, acc, tile.count, tile.channels);
    }
  });
}

// Tiles `first` … `first + count` of the batch for one block of channels, from their transformed input
// v[position][max_pixels][channels]: 16 products, the output transform, the epilogue.
void Network::run_tiles(Plan& plan, int node, int block_index, int64_t first, int count, const uint8_t* v, int32_t* m) {
  const NodeSpec& s = nodes_[node];
  const Step& step = *plan.steps[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  const Value* residual = s.residual != kNone ? &plan.values[s.residual + 1] : nullptr;
  const Panels& panels = *step.winograd;
  const int first_channel = block_index * panels.block;
  Tile tile;
  tile.channels = std::min(panels.block, s.n - first_channel), tile.count = count;
  tile.runs = 1, tile.groups = panels.groups, tile.run_stride = 0;
  const int width = (tile.channels + isa_.lanes - 1) / isa_.lanes * isa_.lanes;
  for (int position = 0; position < 16; ++position) {
    for (int t = 0; t < count; ++t) tile.pixels[t] = v + ((int64_t)position * isa_.max_pixels + t) * in.cs;
    tile.weights = panels.bytes.data() + block_index * panels.block_bytes + (int64_t)position * panels.groups * width * 4;
    tile.init = panels.init.data() + position * (panels.init.size() / 16) + first_channel;
    isa_.multiply(panels.kind, tile, m + (int64_t)position * count * width);
  }
  int32_t* y = m + 16 * kMaxPixels * kMaxChannels;
  isa_.winograd_output(m, count, width, y);
  Epilogue epilogue = step.epilogue;
  epilogue.gain = step.gain.data() + first_channel, epilogue.bias = step.bias.data() + first_channel;
  epilogue.shift = 2;
  Output to;
  to.has_row_scale = false, to.has_residual = residual != nullptr, to.residual_is_float = residual && residual->is_float;
  const int across = (out.w + 1) / 2, per_image = across * ((out.h + 1) / 2);
  for (int t = 0; t < count; ++t) {
    const int64_t image = (first + t) / per_image;
    const int tile_y = (first + t) % per_image / across * 2, tile_x = (first + t) % across * 2;
    for (int p = 0; p < 4; ++p) {
      const int yy = tile_y + p / 2, xx = tile_x + p % 2, pixel = yy * out.w + xx;
      void*& target = to.out[t * 4 + p];
      target = nullptr;  // beyond an odd edge
      if (yy >= out.h || xx >= out.w) continue;
      target = out.data + (image * out.image() + step.out_offset[pixel] + first_channel) * (out.is_float ? 4 : 1);
      if (residual)
        to.residual[t * 4 + p] = residual->data + (image * residual->image() + step.residual_offset[pixel] + first_channel) * (residual->is_float ? 4 : 1);
    }
  }
  isa_.finish(epilogue, to, y, count * 4, tile.channels);
}

void Network::run_winograd(Plan& plan, int node, Member& member) {
  const NodeSpec& s = nodes_[node];
  const Step& step = *plan.steps[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  const int most = isa_.max_pixels, blocks = (s.n + step.winograd->block - 1) / step.winograd->block;
  const int across = (out.w + 1) / 2, per_image = across * ((out.h + 1) / 2);
  const int64_t tiles = (int64_t)per_image * in.n, groups = (tiles + most - 1) / most;
  const size_t group_bytes = (size_t)16 * most * in.cs;
  const size_t m_bytes = (16 + 4) * kMaxPixels * kMaxChannels * sizeof(int32_t);
  auto transform = [&](int64_t group, uint8_t* v) {
    for (int t = 0; t < most && group * most + t < tiles; ++t) {
      const int64_t tile = group * most + t;
      const int y = tile % per_image / across * 2, x = tile % across * 2;
      const uint8_t* patch = in.data + tile / per_image * in.image() + in.at(y - s.padding[0], x - s.padding[1]);
      isa_.winograd_input(patch, in.row(), in.cs, in.cs, v + t * in.cs, (int64_t)most * in.cs);
    }
  };
  auto count = [&](int64_t group) { return (int)std::min<int64_t>(most, tiles - group * most); };
  // Where there are many tiles, a thread transforms a few groups and uses them at once for all channels, from its cache;
  // else the threads share the transform and split channels as well.
  const int64_t chunk = std::min<int64_t>(8, std::max<int64_t>(1, (192 << 10) / (int64_t)group_bytes));
  const int64_t chunks = (groups + chunk - 1) / chunk;
  if (chunks >= 3 * threads_) {
    member.share(chunks, [&](int64_t item) {
      uint8_t* base = scratch(member.index(), m_bytes + chunk * group_bytes);
      uint8_t* v = base + m_bytes;
      const int64_t first = item * chunk, last = std::min(groups, first + chunk);
      for (int64_t g = first; g < last; ++g) transform(g, v + (g - first) * group_bytes);
      for (int b = 0; b < blocks; ++b)
        for (int64_t g = first; g < last; ++g)
          run_tiles(plan, node, b, g * most, count(g), v + (g - first) * group_bytes, (int32_t*)base);
    });
    return;
  }
  member.share(groups, [&](int64_t g) { transform(g, plan.shared.data() + g * group_bytes); });
  const int64_t per_item = team_chunk(groups, blocks, threads_, 4), items = (groups + per_item - 1) / per_item;
  member.share(items * blocks, [&](int64_t item) {
    uint8_t* base = scratch(member.index(), m_bytes);
    const int64_t first = item / blocks * per_item;
    for (int64_t g = first; g < std::min(groups, first + per_item); ++g)
      run_tiles(plan, node, item % blocks, g * most, count(g), plan.shared.data() + g * group_bytes, (int32_t*)base);
  });
}

void Network::run_max_pool(Plan& plan, int node, Member& member) {
  const NodeSpec& s = nodes_[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  member.share((int64_t)out.n * out.h, [&](int64_t item) {
    const int64_t b = item / out.h;
    const int y = item % out.h, top = y * s.stride[0] - s.padding[0];
    for (int x = 0; x < out.w; ++x) {
      const int left = x * s.stride[1] - s.padding[1];
      uint8_t* to = out.data + b * out.image() + out.at(y, x);
      std::memset(to, 0, out.cs);  // the smallest code: padding never wins
      for (int yy = std::max(top, 0); yy < std::min(top + s.kernel[0], in.h); ++yy)
        for (int xx = std::max(left, 0); xx < std::min(left + s.kernel[1], in.w); ++xx)
          isa_.max_row(in.data + b * in.image() + in.at(yy, xx), in.cs, to);
    }
  });
}

void Network::run_avg_pool(Plan& plan, int node, Member& member) {
  const Step& step = *plan.steps[node];
  const Value &in = plan.values[nodes_[node].input + 1], &out = plan.values[node + 1];
  member.share(out.n, [&](int64_t b) {
    std::vector<int32_t> sum(step.gain.size() + in.cs, 0);
    for (int y = 0; y < in.h; ++y)
      for (int x = 0; x < in.w; ++x) isa_.add_row(in.data + b * in.image() + in.at(y, x), in.cs, sum.data());
    Epilogue epilogue = step.epilogue;
    epilogue.gain = step.gain.data(), epilogue.bias = step.bias.data(), epilogue.shift = 0;
    Output to;
    to.has_row_scale = to.has_residual = to.residual_is_float = false;
    to.out[0] = out.data + (b * out.image() + out.at(0, 0)) * (out.is_float ? 4 : 1);
    isa_.finish(epilogue, to, sum.data(), 1, out.c);
  });
}

}  // namespace ternary
