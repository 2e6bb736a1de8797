#include "plan.h"

#include <cstring>
#include <stdexcept>

namespace ternary {
namespace {

// 4, 5 or 6 (kernels.h), or 0: not for this node. Where sides 4 and 6 are possible, 4 has always been faster.
int winograd_side(const Node& s, const Value& in, const Value& out) {
  // Fewer than 16 channels are not worth a transform; more could overflow.
  const bool possible = s.op == Op::kConv && s.ternary && s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1] &&
                        s.stride[0] <= 2 && s.c >= 16 && s.c < 14000 && s.pad_values.empty() && !in.is_float;
  if (!possible) return 0;
  if (in.code_max <= 63) return s.stride[0] == 1 ? 4 : 5;
  // Half of the plain algorithm's work: not where half of it would be for outputs beyond the edges.
  return s.stride[0] == 1 && (int64_t)round_up(out.h, 4) * round_up(out.w, 4) < 2 * (int64_t)out.h * out.w ? 6 : 0;
}

// Of what a convolution reads: a border for its padding, and what Winograd's whole tiles read beyond it where they end beyond the output.
void surround(Value& in, const Node& s, const Value& out) {
  in.border = std::max({in.border, s.padding[0], s.padding[1]});
  const int side = winograd_side(s, in, out), outputs = winograd_outputs(side);
  if (!side) return;
  const int last_row = s.stride[0] * (round_up(out.h, outputs) - 1) + 2 - s.padding[0] - (in.h - 1);
  const int last_column = s.stride[0] * (round_up(out.w, outputs) - 1) + 2 - s.padding[1] - (in.w - 1);
  in.extra = std::max({in.extra, last_row - in.border, last_column - in.border});
}

// Real sizes of what a node puts out. Throws what does not fit together.
Value shape_of(const Node& s, int i, const Value& in) {
  if (in.is_float) refuse(i, "reads a float32 value");
  Value out;
  out.n = in.n, out.c = s.op == Op::kConv || s.op == Op::kLinear ? s.n : in.c, out.h = out.w = 1;
  out.is_float = !s.out_max, out.code_max = s.out_max.value_or(0);
  if (s.op == Op::kConv || s.op == Op::kMaxPool) {
    out.h = (in.h + 2 * s.padding[0] - s.kernel[0]) / s.stride[0] + 1;
    out.w = (in.w + 2 * s.padding[1] - s.kernel[1]) / s.stride[1] + 1;
    if (in.h + 2 * s.padding[0] < s.kernel[0] || in.w + 2 * s.padding[1] < s.kernel[1]) refuse(i, "has a kernel larger than its input");
  }
  if (s.op == Op::kMaxPool) out.is_float = false, out.code_max = in.code_max;
  if (s.op == Op::kAvgPool && (int64_t)in.h * in.w > most_inputs(Weights::kSmall)) refuse(i, "averages too many pixels for 32-bit sums");
  if (s.op == Op::kConv && s.c != in.c) refuse(i, "expects " + std::to_string(s.c) + " channels and reads " + std::to_string(in.c));
  const int64_t inputs = (int64_t)in.c * in.h * in.w;
  if (s.op == Op::kLinear && s.c != inputs) refuse(i, "expects " + std::to_string(s.c) + " inputs and reads " + std::to_string(inputs));
  out.cs = out.is_float ? out.c : round_up(out.c, 4);
  return out;
}

// What surrounds a value: zeros (null) or one byte a channel, as the convolutions that read it say.
const uint8_t* padding_of(const Model& model, int value, int channels) {
  const uint8_t* pad = nullptr;
  bool zeros = false;
  for (const Node& s : model.nodes) {
    if (s.input + 1 != value || s.op != Op::kConv || (s.padding[0] == 0 && s.padding[1] == 0)) continue;
    if (std::all_of(s.pad_values.begin(), s.pad_values.end(), [](uint8_t v) { return v == 0; })) zeros = true;  // or none are given
    else if (pad && std::memcmp(pad, s.pad_values.data(), channels) != 0) throw std::invalid_argument("two convolutions pad one value differently");
    else pad = s.pad_values.data();
  }
  if (pad && zeros) throw std::invalid_argument("two convolutions pad one value differently");
  return pad;
}

// Memory for those values that are `wanted`; last_use says of each which node is the last during which it has to stay. Memory is used
// again by a later value of exactly the same layout, so the border, written here, stays as it is.
void allocate(const Model& model, const std::vector<bool>& wanted, const std::vector<int>& last_use, Buffers& buffers) {
  std::vector<Value>& values = buffers.values;
  std::map<std::vector<int64_t>, std::vector<uint8_t*>> free_buffers;
  std::vector<std::vector<int64_t>> keys(values.size());
  std::vector<std::vector<int>> last_used(values.size() + 1);  // by node
  for (int v = 0; v < (int)values.size(); ++v)
    if (wanted[v] && last_use[v] >= 0) last_used[last_use[v]].push_back(v);
  for (int v = 0; v < (int)values.size(); ++v) {
    // Node v - 1 makes it, beside all that this node or a later one reads.
    if (v >= 2)
      for (int u : last_used[v - 2]) free_buffers[keys[u]].push_back(values[u].data);
    if (!wanted[v]) continue;
    Value& value = values[v];
    const uint8_t* pad = padding_of(model, v, value.c);
    keys[v] = {value.h, value.w, value.c, value.border, value.extra, value.is_float, pad ? v : -1};
    auto& candidates = free_buffers[keys[v]];
    if (candidates.empty()) {
      const int64_t bytes = value.image_bytes() * value.n;
      buffers.storage.emplace_back(bytes + 128);  // zeroed; up to 63 bytes past a run are read: whole tiles, and vectors that gather
      uint8_t* data = buffers.storage.back().data();
      for (int64_t e = 0; pad && e < bytes; e += value.cs) std::memcpy(data + e, pad, value.c);
      candidates.push_back(data);
    }
    value.data = candidates.back();
    candidates.pop_back();
  }
}

// Of each value the last node that reads it.
std::vector<int> last_reads(const std::vector<Node>& nodes) {
  std::vector<int> last(nodes.size() + 1, -1);
  for (size_t i = 0; i < nodes.size(); ++i) {
    last[nodes[i].input + 1] = i;
    if (nodes[i].residual) last[*nodes[i].residual + 1] = i;
  }
  last.back() = (int)nodes.size();
  return last;
}

Step make_step(const Model& model, PackedWeights& weights, const std::vector<Value>& values, int node) {
  const Node& s = model.nodes[node];
  const Value &in = values[s.input + 1], &out = values[node + 1];
  const Value* residual = s.residual ? &values[*s.residual + 1] : nullptr;
  Step step;
  step.epilogue.residual_gain = s.residual_gain, step.epilogue.relu = s.relu, step.epilogue.out_max = s.out_max.value_or(0);
  step.gain = s.gain, step.bias = s.bias;
  const int padded = round_up(out.c, model.isa.lanes * model.isa.max_vectors);
  if (s.op == Op::kAvgPool) step.gain.assign(padded, s.gain[0]);
  step.gain.resize(padded, 0.0f), step.bias.resize(padded, 0.0f);
  if (s.op == Op::kMaxPool || s.op == Op::kAvgPool) return step;
  step.algorithm = Algorithm::kDirect;
  step.direct = weights.direct(node, in);
  step.winograd_side = winograd_side(s, in, out);
  for (int y = 0; y < out.h; ++y)
    for (int x = 0; x < out.w; ++x) {
      step.in_offset.push_back(in.at(y * s.stride[0] - s.padding[0], x * s.stride[1] - s.padding[1]));
      step.out_offset.push_back(out.at(y, x) * out.element_bytes());
      step.residual_offset.push_back(residual ? residual->at(y, x) * residual->element_bytes() : 0);
    }
  return step;
}

// Images that a thread takes through nodes first ... end - 1 by itself, so that values stay in its core's own cache from node to node
// and no thread waits for another: so many that their values are as much memory as the weights, as far as the cache holds these
// values. With more, values would leave the cache; with fewer, weights would be read more often. 0: there are too few images
// for an even share.
int images_a_part(const Model& model, const Plan& plan, int first, int end) {
  constexpr int64_t kCached = 768 << 10;
  constexpr int kMost = 16;
  int64_t weights = 0, values = 1;  // bytes; values of a node: all that it reads and writes
  for (int i = first; i < end; ++i) {
    const Node& s = model.nodes[i];
    weights += (int64_t)s.codes.size() / 2;  // about as packed
    int64_t bytes = plan.whole.values[s.input + 1].image_bytes() + plan.whole.values[i + 1].image_bytes();
    if (s.residual) bytes += plan.whole.values[*s.residual + 1].image_bytes();
    values = std::max(values, bytes);
  }
  int part = (int)std::clamp<int64_t>(std::min(weights, kCached) / values, 1, kMost);
  const auto uneven = [&] { return (plan.batch + part * plan.threads - 1) / (part * plan.threads) * part * plan.threads * 10 > plan.batch * 11; };
  while (part > 0 && uneven()) --part;
  return part;
}

// Linear layers are for all images at once, as their weights are too many to be read for a few; what comes before them is cut wherever
// one value is all that goes on, and put together where the same number of images is right.
std::vector<Stage> stages_of(const Model& model, const Plan& plan) {
  const std::vector<Node>& nodes = model.nodes;
  const int n = (int)nodes.size();
  const int front = std::find_if(nodes.begin(), nodes.end(), [](const Node& s) { return s.op == Op::kLinear; }) - nodes.begin();
  const std::vector<int> last = last_reads(nodes);
  std::vector<Stage> stages;
  int first = 0, waiting = -1;  // the last node that reads any value before `end`
  for (int end = 1; end <= front; ++end) {
    waiting = std::max(waiting, last[end - 1]);
    if (waiting >= end) continue;
    const int part = images_a_part(model, plan, first, end);
    if (!stages.empty() && stages.back().part == part) stages.back().end = end;
    else stages.push_back({first, end, part, {}});
    first = end;
  }
  if (first < n) stages.push_back({first, n, 0, {}});
  return stages;
}

}  // namespace

std::vector<Value> shapes(const Model& model, int batch, int height, int width) {
  if (model.nodes.empty()) throw std::invalid_argument("a network without nodes");
  std::vector<Value> values(1);
  Value& image = values[0];
  image.n = batch, image.h = height, image.w = width, image.c = model.image_channels;
  image.cs = round_up(image.c, 4);
  for (size_t i = 0; i < model.nodes.size(); ++i) {
    const Node& s = model.nodes[i];
    values.push_back(shape_of(s, (int)i, values[s.input + 1]));
    const Value& out = values.back();
    if (s.op == Op::kConv) surround(values[s.input + 1], s, out);
    if (!s.residual) continue;
    const Value& r = values[*s.residual + 1];
    if (r.c != out.c || r.h != out.h || r.w != out.w) refuse(i, "adds a value of another shape");
  }
  return values;
}

int64_t enter_part(const Plan& plan, const Stage& stage, int64_t part, Buffers& own) {
  const int64_t first = part * stage.part;
  for (int v = stage.first; v <= stage.end; ++v) own.values[v].n = (int)std::min<int64_t>(stage.part, plan.batch - first);
  if (stage.first > 0) own.values[stage.first].data = plan.whole.values[stage.first].element(first, 0);
  own.values[stage.end].data = plan.whole.values[stage.end].element(first, 0);
  return first;
}

Plan make_plan(const Model& model, PackedWeights& weights, int batch, int height, int width, int threads) {
  Plan plan;
  plan.batch = batch, plan.height = height, plan.width = width, plan.threads = threads;
  plan.whole.values = shapes(model, batch, height, width);
  const int n = (int)model.nodes.size();
  for (int i = 0; i < n; ++i) plan.steps.push_back(make_step(model, weights, plan.whole.values, i));
  plan.stages = stages_of(model, plan);
  const std::vector<int> last = last_reads(model.nodes);
  std::vector<int> last_of_batch = last;  // parts of a stage are done at different times
  std::vector<bool> wanted(n + 1, false);
  wanted[0] = plan.stages[0].part == 0;
  for (Stage& stage : plan.stages) {
    if (stage.part) last_of_batch[stage.first] = stage.end - 1;
    for (int v = stage.first + 1; v <= stage.end; ++v) wanted[v] = stage.part == 0 || v == stage.end;
    for (int thread = 0; stage.part && thread < threads; ++thread) {
      std::vector<bool> inner(n + 1, false);
      for (int v = stage.first + (stage.first > 0); v < stage.end; ++v) inner[v] = true;
      Buffers part;
      part.values = shapes(model, stage.part, height, width);
      allocate(model, inner, last, part);
      stage.parts.push_back(std::move(part));
    }
  }
  allocate(model, wanted, last_of_batch, plan.whole);
  return plan;
}

}  // namespace ternary
