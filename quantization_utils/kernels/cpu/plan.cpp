// Planning: sizes, buffers and weight panels of a network for one image size and batch, and the measured choice per node.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "network.h"

namespace ternary {
namespace {

int round_up(int value, int to) { return (value + to - 1) / to * to; }

[[noreturn]] void refuse(int node, const std::string& why) {
  throw std::invalid_argument("node " + std::to_string(node) + " " + why);
}

// U = (2G) g (2G)^T = 4 G g G^T with 2G = [2 0 0; 1 1 1; 1 -1 1; 0 0 2]; for g in {-1,0,1}: |u| <= 9.
void transform_kernel(const int8_t* g, int* u) {
  static const int twice_g[4][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      int sum = 0;
      for (int a = 0; a < 3; ++a)
        for (int b = 0; b < 3; ++b) sum += twice_g[i][a] * g[a * 3 + b] * twice_g[j][b];
      u[i * 4 + j] = sum;
    }
}

}  // namespace

Network::Network(const Kernels& isa, std::vector<NodeSpec> nodes, int image_channels)
    : isa_(isa), nodes_(std::move(nodes)), image_channels_(image_channels) {}

Plan& Network::plan(int batch, int height, int width) {
  auto& slot = plans_[{batch, height, width}];
  if (slot) return *slot;
  auto plan = std::make_unique<Plan>();
  plan->batch = batch, plan->height = height, plan->width = width;
  make_values(*plan);
  allocate(*plan);
  for (size_t i = 0; i < nodes_.size(); ++i) make_step(*plan, (int)i);
  slot = std::move(plan);
  return *slot;
}

bool Network::winograd_possible(const Plan& plan, int node) const {
  const NodeSpec& s = nodes_[node];
  // Fewer than 16 channels are not worth a transform.
  return s.op == Op::kConv && s.ternary && s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == 1 && s.stride[1] == 1 &&
         s.c >= 16 && s.pad_values.empty() && plan.values[s.input + 1].code_max <= 63 && !plan.values[s.input + 1].is_float;
}

void Network::make_values(Plan& plan) {
  plan.values.resize(nodes_.size() + 1);
  Value& image = plan.values[0];
  image.n = plan.batch, image.h = plan.height, image.w = plan.width, image.c = image_channels_;
  image.cs = round_up(image.c, 4);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const NodeSpec& s = nodes_[i];
    Value& in = plan.values[s.input + 1];
    Value& out = plan.values[i + 1];
    if (in.is_float) refuse(i, "reads a float32 value");
    out.n = in.n, out.is_float = s.out_max == 0, out.code_max = out.is_float ? 0 : s.out_max;
    if (s.op == Op::kConv || s.op == Op::kMaxPool) {
      out.c = s.op == Op::kConv ? s.n : in.c;
      out.h = (in.h + 2 * s.padding[0] - s.kernel[0]) / s.stride[0] + 1;
      out.w = (in.w + 2 * s.padding[1] - s.kernel[1]) / s.stride[1] + 1;
      if (in.h + 2 * s.padding[0] < s.kernel[0] || in.w + 2 * s.padding[1] < s.kernel[1]) refuse(i, "has a kernel larger than its input");
    } else {
      out.c = s.op == Op::kLinear ? s.n : in.c, out.h = out.w = 1;
    }
    if (s.op == Op::kMaxPool) out.is_float = false, out.code_max = in.code_max;
    if (s.op == Op::kConv) {
      if (s.c != in.c) refuse(i, "expects " + std::to_string(s.c) + " channels and reads " + std::to_string(in.c));
      in.border = std::max(in.border, std::max(s.padding[0], s.padding[1]));
      if (winograd_possible(plan, i)) in.extra = std::max(in.extra, std::max(out.h % 2, out.w % 2));
    }
    if (s.op == Op::kLinear && s.c != in.c * in.h * in.w) refuse(i, "expects " + std::to_string(s.c) + " inputs and reads " + std::to_string(in.c * in.h * in.w));
    out.cs = out.is_float ? out.c : round_up(out.c, 4);
    if (s.residual != kNone) {
      const Value& r = plan.values[s.residual + 1];
      if (r.c != out.c || r.h != out.h || r.w != out.w) refuse(i, "adds a value of another shape");
    }
  }
}

// A buffer is used again by a later value of exactly the same layout, so the border, written here, stays as it is.
void Network::allocate(Plan& plan) {
  std::vector<int> last(plan.values.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    last[nodes_[i].input + 1] = i;
    if (nodes_[i].residual != kNone) last[nodes_[i].residual + 1] = i;
  }
  std::map<std::vector<int64_t>, std::vector<uint8_t*>> free_buffers;
  std::vector<std::vector<int64_t>> keys;
  for (size_t v = 0; v < plan.values.size(); ++v) {
    Value& value = plan.values[v];
    const uint8_t* pad = nullptr;
    bool zeros = false;
    for (const NodeSpec& s : nodes_) {
      if (s.input + 1 != (int)v || s.op != Op::kConv || (s.padding[0] == 0 && s.padding[1] == 0)) continue;
      if (s.pad_values.empty()) zeros = true;
      else if (pad && std::memcmp(pad, s.pad_values.data(), value.c) != 0) throw std::invalid_argument("two convolutions pad one value differently");
      else pad = s.pad_values.data();
    }
    if (pad && zeros) throw std::invalid_argument("two convolutions pad one value differently");
    const int64_t elements = value.image() * value.n;
    const std::vector<int64_t> key = {value.h, value.w, value.c, value.border, value.extra, value.is_float, pad ? (int64_t)v : -1};
    keys.push_back(key);
    auto& candidates = free_buffers[key];
    if (candidates.empty()) {
      const size_t bytes = elements * (value.is_float ? 4 : 1) + 192;  // tiles may read up to 15 bytes past a run
      plan.storage.push_back(std::make_unique<uint8_t[]>(bytes));      // zeroed
      uint8_t* data = plan.storage.back().get() + (64 - (uintptr_t)plan.storage.back().get() % 64);
      for (int64_t e = 0; pad && e < elements; e += value.cs) std::memcpy(data + e, pad, value.c);
      candidates.push_back(data);
    }
    value.data = candidates.back();
    candidates.pop_back();
    // Values that node v - 1 was the last to read are free from now on.
    for (size_t u = 0; v > 0 && u < v; ++u)
      if (last[u] == (int)v - 1) free_buffers[keys[u]].push_back(plan.values[u].data);
  }
}

std::shared_ptr<Panels> Network::panels(int node, const Value& in, Algorithm algorithm) {
  const NodeSpec& s = nodes_[node];
  const bool linear = s.op == Op::kLinear;
  const int kh = linear ? in.h : s.kernel[0], kw = linear ? in.w : s.kernel[1], c = linear ? in.c : s.c;
  auto& slot = packed_[{node, (int)algorithm, kh, kw, in.cs}];
  if (slot) return slot;
  const int64_t k = (int64_t)kh * kw * c;
  if (algorithm == Algorithm::kWinograd) {
    std::vector<int8_t> u((size_t)s.n * c * 16);
    std::vector<int> sum((size_t)s.n * 16, 0);
    for (int64_t f = 0; f < (int64_t)s.n * c; ++f) {
      int values[16];
      transform_kernel(s.codes.data() + f * 9, values);
      for (int p = 0; p < 16; ++p) u[f * 16 + p] = (int8_t)values[p], sum[f / c * 16 + p] += values[p];
    }
    slot = std::make_shared<Panels>(pack_panels(isa_, Weights::kSmall, s.n, 16, in.cs, [&](int n, int position, int i) {
      return i < c ? u[((size_t)n * c + i) * 16 + position] : 0;
    }));
    // V carries +128 in every position but (1,1): start the accumulators at -128 * sum(u) instead of correcting after.
    const size_t padded = slot->init.size();
    slot->init.assign(padded * 16, 0);
    for (int p = 0; p < 16; ++p)
      for (int n = 0; p != 5 && n < s.n; ++n) slot->init[p * padded + n] = -128 * sum[(size_t)n * 16 + p];
    return slot;
  }
  Weights kind = s.ternary ? Weights::kTwoBit : Weights::kInt8;
  if (s.ternary && k >= 131000) kind = Weights::kSmall;
  if (!s.ternary && k >= 66000) refuse(node, "has too many 8-bit weights a channel for 32-bit accumulators");
  slot = std::make_shared<Panels>(pack_panels(isa_, kind, s.n, kh, kw * in.cs, [&](int n, int run, int i) {
    const int x = i / in.cs, ch = i % in.cs;
    return ch < c ? s.codes[(((size_t)n * c + ch) * kh + run) * kw + x] : 0;
  }));
  return slot;
}

void Network::make_step(Plan& plan, int node) {
  const NodeSpec& s = nodes_[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  auto step = std::make_shared<Step>();
  plan.steps.push_back(step);
  step->epilogue.residual_gain = s.residual_gain, step->epilogue.relu = s.relu, step->epilogue.out_max = s.out_max;
  step->gain = s.gain, step->bias = s.bias;
  const int block = isa_.lanes * isa_.max_vectors;
  step->gain.resize(round_up(out.c, block), s.op == Op::kAvgPool ? s.gain[0] : 0.0f);
  if (s.op == Op::kAvgPool) std::fill(step->gain.begin(), step->gain.end(), s.gain[0]);
  step->bias.resize(round_up(out.c, block), 0.0f);
  if (s.op == Op::kMaxPool || s.op == Op::kAvgPool) return;
  step->algorithm = Algorithm::kDirect;
  step->direct = panels(node, in, Algorithm::kDirect);
  step->winograd_possible = winograd_possible(plan, node);
  const Value* residual = s.residual != kNone ? &plan.values[s.residual + 1] : nullptr;
  for (int y = 0; y < out.h; ++y)
    for (int x = 0; x < out.w; ++x) {
      step->in_offset.push_back(in.at(y * s.stride[0] - s.padding[0], x * s.stride[1] - s.padding[1]));
      step->out_offset.push_back(out.at(y, x));
      step->residual_offset.push_back(residual ? residual->at(y, x) : 0);
    }
}

// Median microseconds of one node. Not the smallest: the other threads may do all of a phase before this one looks at the clock.
double Network::measure(Plan& plan, int node, int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> micros;
  parallel(threads, [&](Member& member) {
    for (int repetition = 0; repetition < 10; ++repetition) {
      const auto start = Clock::now();
      run_node(plan, node, member);
      if (member.index() == 0 && repetition > 0) micros.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
  });
  std::nth_element(micros.begin(), micros.begin() + micros.size() / 2, micros.end());
  return micros[micros.size() / 2];
}

// Every node by each algorithm that can run it, the faster wins; the buffers hold whatever they hold.
void Network::choose(Plan& plan, int threads, const std::string& algorithm) {
  size_t shared = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    Step& step = *plan.steps[i];
    const Value &in = plan.values[nodes_[i].input + 1], &out = plan.values[i + 1];
    std::vector<Algorithm> candidates = {step.algorithm};
    if (step.winograd_possible && algorithm != "direct") {
      const int64_t tiles = (int64_t)in.n * ((out.h + 1) / 2) * ((out.w + 1) / 2);
      shared = std::max(shared, (size_t)((tiles + isa_.max_pixels) * 16 * in.cs));
      plan.shared.resize(shared);
      step.winograd = panels(i, in, Algorithm::kWinograd);
      candidates.push_back(Algorithm::kWinograd);
      if (algorithm == "winograd") step.algorithm = Algorithm::kWinograd;
    }
    if (algorithm != "auto") continue;
    double best = 1e30;
    Algorithm winner = candidates[0];
    for (Algorithm candidate : candidates) {
      step.algorithm = candidate;
      const double median = measure(plan, i, threads);
      step.micros[candidate == Algorithm::kWinograd] = median;
      if (median < best) best = median, winner = candidate;
    }
    step.algorithm = winner;
    if (winner != Algorithm::kWinograd) step.winograd.reset();
  }
}

std::vector<int64_t> Network::out_shape(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Value& last = plan(batch, height, width).values.back();
  const Op op = nodes_.back().op;
  if (op == Op::kConv || op == Op::kMaxPool) return {last.n, last.c, last.h, last.w};
  return {last.n, last.c};
}

std::string Network::describe(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  Plan& p = plan(batch, height, width);
  static const char* ops[] = {"conv", "linear", "max_pool", "avg_pool"};
  static const char* algorithms[] = {"direct", "winograd", "pool"};
  std::ostringstream text;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Step& step = *p.steps[i];
    const Value& out = p.values[i + 1];
    const bool weights = nodes_[i].op == Op::kConv || nodes_[i].op == Op::kLinear;
    const int64_t macs = weights ? (int64_t)nodes_[i].codes.size() * out.h * out.w * out.n : 0;
    text << i << ' ' << ops[(int)nodes_[i].op] << ' ' << algorithms[(int)step.algorithm] << ' ' << step.micros[0] << ' '
         << step.micros[1] << ' ' << macs << '\n';
  }
  return text.str();
}

}  // namespace ternary
