#include "run.h"

#include <cstring>

namespace ternary {
namespace {

// Pixels to bytes.
void run_image(const Model& model, const Value& v, const float* images, Member& member) {
  const int64_t plane = (int64_t)v.h * v.w;
  const int rows = 4;  // a row is too little for an item
  const int per_image = (v.h + rows - 1) / rows;
  member.share((int64_t)v.n * per_image, [&](int64_t item) {
    const int b = item / per_image, first = item % per_image * rows;
    std::vector<const float*> planes(v.c);
    for (int y = first; y < std::min(first + rows, v.h); ++y) {
      for (int c = 0; c < v.c; ++c) planes[c] = images + ((int64_t)b * v.c + c) * plane + (int64_t)y * v.w;
      model.isa.image_row(planes.data(), v.c, v.w, v.element(b, v.at(y, 0)), v.cs);
    }
  });
}

// One thread alone: a stage for some images.
void run_part(const Model& model, Plan& plan, Stage& stage, const float* images, int64_t part, const Worker& worker) {
  Buffers& own = stage.parts[worker.member.index()];
  Member alone(worker.member.index());
  const int64_t first = enter_part(plan, stage, part, own);
  if (stage.first == 0) run_image(model, own.values[0], images + first * model.image_channels * plan.height * plan.width, alone);
  for (int i = stage.first; i < stage.end; ++i) run_node(model, plan, own, i, {alone, worker.scratch});
}

void run_direct(const Task& t) {
  const Value &in = t.in, &out = t.out;
  const Panels& panels = *t.step.direct;
  const int block = panels.block, blocks = (t.node.n + block - 1) / block, most = t.isa.max_pixels;
  const int per_image = out.h * out.w;
  const int64_t pixels = (int64_t)per_image * in.n, groups = (pixels + most - 1) / most;
  Member& member = t.worker.member;
  const int64_t chunk = team_chunk(groups, blocks, member.team_size(), 16);
  member.share((groups + chunk - 1) / chunk * blocks, [&](int64_t item) {
    const int first_channel = item % blocks * block;
    alignas(64) int32_t acc[kMaxPixels * kMaxChannels];
    Tile tile;
    tile.channels = std::min(block, t.node.n - first_channel);
    tile.runs = panels.runs, tile.groups = panels.groups, tile.run_stride = in.row();
    tile.weights = panels.bytes.data() + first_channel / block * panels.block_bytes;
    tile.init = panels.init.data() + first_channel;
    const Epilogue epilogue = t.step.epilogue_from(first_channel, unit_of(panels.kind));
    Output to;
    set_residual(to, t.residual);
    const int64_t first = item / blocks * chunk, end = std::min(groups, first + chunk), start = first * pixels / groups;
    int64_t image = start / per_image, pixel = start % per_image;
    const uint8_t *from = nullptr, *added = nullptr;
    uint8_t* into = nullptr;
    auto enter_image = [&] {
      from = in.element(image, 0), into = out.element(image, first_channel);
      if (t.residual) added = t.residual->element(image, first_channel);
    };
    enter_image();
    for (int64_t group = first; group < end; ++group) {
      tile.count = (int)((group + 1) * pixels / groups - group * pixels / groups);
      for (int p = 0; p < tile.count; ++p, ++pixel) {
        if (pixel == per_image) pixel = 0, ++image, enter_image();
        tile.pixels[p] = from + t.step.in_offset[pixel], to.out[p] = into + t.step.out_offset[pixel];
        if (t.residual) to.residual[p] = added + t.step.residual_offset[pixel];
      }
      t.isa.multiply(panels.kind, tile, acc);
      t.isa.finish(epilogue, to, acc, tile.count, tile.channels);
    }
  });
}

// A linear layer: a vector of channels at a time, on the inputs that it reads. What follows them up to a whole group is any
// byte times a zero weight.
void run_skipping(const Task& t) {
  const Value &in = t.in, &out = t.out;
  const SparsePanels& panels = *t.step.sparse;
  const int lanes = t.isa.lanes, vectors = (int)panels.parts.size(), most = t.isa.max_pixels;
  const int64_t room = (int64_t)t.node.c + 128;
  static constexpr int32_t zeros[kMaxChannels] = {};
  t.worker.member.share(vectors, [&](int64_t vector) {
    const int64_t first = vector * lanes;
    alignas(64) int32_t acc[kMaxPixels * kMaxChannels];
    Tile tile;
    tile.channels = (int)std::min<int64_t>(lanes, t.node.n - first);
    tile.runs = 1, tile.groups = panels.parts[vector].groups, tile.run_stride = 0;
    tile.weights = panels.bytes.data() + panels.parts[vector].first, tile.init = zeros;
    const Epilogue epilogue = t.step.epilogue_from(first, unit_of(Weights::kTwoBit));
    Output to;
    set_residual(to, t.residual);
    uint8_t* gathered = t.worker.room(most * room);
    for (int64_t m = 0; m < in.n; m += tile.count) {
      tile.count = (int)std::min<int64_t>(most, in.n - m);
      for (int p = 0; p < tile.count; ++p) {
        uint8_t* end = gathered + p * room;
        tile.pixels[p] = end;
        for (int run = 0; run < panels.runs; ++run)
          end += t.isa.gather(panels.used.data() + (vector * panels.runs + run) * panels.words, panels.words, in.element(m + p, in.at(run, 0)), end);
        to.out[p] = out.element(m + p, first) + t.step.out_offset[0];
        if (t.residual) to.residual[p] = t.residual->element(m + p, first) + t.step.residual_offset[0];
      }
      t.isa.multiply(Weights::kTwoBit, tile, acc);
      t.isa.finish(epilogue, to, acc, tile.count, tile.channels);
    }
  });
}

void run_max_pool(const Task& t) {
  const Value &in = t.in, &out = t.out;
  t.worker.member.share((int64_t)out.n * out.h, [&](int64_t item) {
    const int64_t b = item / out.h, row_bytes = (int64_t)in.w * in.cs;
    const int y = item % out.h, top = y * t.node.stride[0] - t.node.padding[0], first = std::max(top, 0);
    // Down the columns in long rows, then across them. Padding never wins: the smallest code is 0.
    uint8_t* highest = t.worker.room(row_bytes);
    std::memcpy(highest, in.element(b, in.at(first, 0)), row_bytes);
    for (int yy = first + 1; yy < std::min(top + t.node.kernel[0], in.h); ++yy) t.isa.max_row(in.element(b, in.at(yy, 0)), (int)row_bytes, highest);
    for (int x = 0; x < out.w; ++x) {
      const int left = x * t.node.stride[1] - t.node.padding[1], from = std::max(left, 0);
      uint8_t* to = out.element(b, out.at(y, x));
      std::memcpy(to, highest + (int64_t)from * in.cs, out.cs);
      for (int xx = from + 1; xx < std::min(left + t.node.kernel[1], in.w); ++xx) t.isa.max_row(highest + (int64_t)xx * in.cs, in.cs, to);
    }
  });
}

void run_avg_pool(const Task& t) {
  const Value &in = t.in, &out = t.out;
  t.worker.member.share(out.n, [&](int64_t b) {
    std::vector<int32_t> sum(t.step.gain.size() + in.cs, 0);
    for (int y = 0; y < in.h; ++y)
      for (int x = 0; x < in.w; ++x) t.isa.add_row(in.element(b, in.at(y, x)), in.cs, sum.data());
    Output to;
    set_residual(to, nullptr);
    to.out[0] = out.element(b, out.at(0, 0));
    t.isa.finish(t.step.epilogue_from(0, 1.0f), to, sum.data(), 1, out.c);
  });
}

}  // namespace

int64_t team_chunk(int64_t groups, int blocks, int threads, int64_t most) {
  constexpr int kItemsPerThread = 6;  // enough that an uneven finish costs little
  const int64_t wanted = (int64_t)threads * kItemsPerThread;
  return std::max<int64_t>(1, std::min(most, groups * blocks / wanted));
}

void run_plan(const Model& model, Plan& plan, const float* images, const Worker& worker) {
  for (Stage& stage : plan.stages) {
    if (stage.part) {
      worker.member.share((plan.batch + stage.part - 1) / stage.part, [&](int64_t part) { run_part(model, plan, stage, images, part, worker); });
      continue;
    }
    if (stage.first == 0) run_image(model, plan.whole.values[0], images, worker.member);
    for (int i = stage.first; i < stage.end; ++i) run_node(model, plan, plan.whole, i, worker);
  }
}

void run_node(const Model& model, Plan& plan, const Buffers& buffers, int node, const Worker& worker) {
  const Node& s = model.nodes[node];
  const Step& step = plan.steps[node];
  const std::vector<Value>& values = buffers.values;
  const Task task = {model.isa, s, step, values[s.input + 1], values[node + 1], s.residual ? &values[*s.residual + 1] : nullptr, worker, plan.shared.data()};
  if (s.op == Op::kMaxPool) return run_max_pool(task);
  if (s.op == Op::kAvgPool) return run_avg_pool(task);
  if (step.algorithm == Algorithm::kWinograd) return run_winograd(task);
  if (step.algorithm == Algorithm::kSkipping) return run_skipping(task);
  run_direct(task);
}

}  // namespace ternary
