// Planning: sizes and buffers of a network for one image size and batch, and the measured choice per node.
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "network.h"

namespace ternary {
namespace {

// Plans that are kept: each has buffers of its own.
constexpr size_t kMostPlans = 16;

// The fraction of zero blocks from which skipping is measured: with fewer it never won.
constexpr double kLeastSkipped = 0.125;

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Kernels read as much as a node's numbers say.
void check_sizes(const NodeSpec& s, int i) {
  const bool product = s.op == Op::kConv || s.op == Op::kLinear, conv = s.op == Op::kConv;
  for (int d = 0; d < 2; ++d) {
    if (s.kernel[d] < 1 || s.stride[d] < 1 || s.padding[d] < 0) refuse(i, "has no such kernel, stride or padding");
    if (s.op == Op::kMaxPool && 2 * s.padding[d] > s.kernel[d]) refuse(i, "pads more than half of its kernel");
    const bool slides = conv || s.op == Op::kMaxPool;
    if (!slides && (s.kernel[d] > 1 || s.stride[d] > 1 || s.padding[d])) refuse(i, "has a kernel, stride or padding, and takes its whole input");
  }
  if (product && (int64_t)s.codes.size() != (int64_t)s.n * s.c * (conv ? s.kernel[0] * s.kernel[1] : 1)) refuse(i, "has codes of another shape");
  if (product && (s.gain.size() != (size_t)s.n || s.bias.size() != (size_t)s.n)) refuse(i, "has not one gain and one bias for each channel");
  if (s.out_max < 0 || s.out_max > 255) refuse(i, "puts out codes that no byte holds");
  if (s.op == Op::kAvgPool && s.gain.size() != 1) refuse(i, "has not one gain");
  if (!product && (!s.bias.empty() || s.residual != kNone)) refuse(i, "adds something to a pool");
  if (!s.pad_values.empty() && s.pad_values.size() != (size_t)s.c) refuse(i, "pads other channels than it reads");
}

// Products of one dimension of a convolution's kernel with the image, without those with its padding, over all outputs.
int64_t taps(int in, int out, int kernel, int stride, int padding) {
  int64_t count = 0;
  for (int y = 0; y < out; ++y) {
    const int top = y * stride - padding;
    count += std::max(0, std::min(top + kernel, in) - std::max(top, 0));
  }
  return count;
}

}  // namespace

void refuse(int node, const std::string& why) { throw std::invalid_argument("node " + std::to_string(node) + " " + why); }

Network::Network(const Kernels& isa, std::vector<NodeSpec> nodes, int image_channels)
    : isa_(isa), nodes_(std::move(nodes)), image_channels_(image_channels) {
  constexpr size_t kMaxNodes = (kMaxPhases - 1) / 2;  // the image takes one phase, a node up to two
  for (size_t i = 0; i < nodes_.size(); ++i) check_sizes(nodes_[i], (int)i);
  if (nodes_.size() > kMaxNodes) throw std::invalid_argument("a network of more than " + std::to_string(kMaxNodes) + " nodes does not fit in one parallel region");
  front_ = std::find_if(nodes_.begin(), nodes_.end(), [](const NodeSpec& s) { return s.op == Op::kLinear; }) - nodes_.begin();
  for (size_t i = front_; i < nodes_.size(); ++i)  // only the front's last value is used after it
    if (nodes_[i].input < front_ - 1 || (nodes_[i].residual != kNone && nodes_[i].residual < front_ - 1)) front_ = 0;
}

// Whole images for each thread, where there are enough to share them evenly: few enough at a time for their values to stay in a
// core's own cache from node to node, and no thread waits for another. The linear layers follow for all images at once, as
// their weights are too many to be read for a few.
int Network::images_a_part(const Plan& plan) const {
  int64_t largest = 1;
  for (int v = 0; v < front_; ++v) largest = std::max(largest, plan.values[v].image() * plan.values[v].element_bytes());
  int part = front_ == 0 ? 0 : (int)std::clamp<int64_t>((384 << 10) / largest, 1, 8);
  auto uneven = [&] { return (plan.batch + part * threads_ - 1) / (part * threads_) * part * threads_ * 10 > plan.batch * 11; };
  while (part > 0 && uneven()) --part;
  return part;
}

Plan* Network::found(int batch, int height, int width, int threads) const {
  for (const auto& p : plans_)
    if (p->batch == batch && p->height == height && p->width == width && (threads == 0 || p->threads == threads)) return p.get();
  return nullptr;
}

Plan& Network::plan(int batch, int height, int width) {
  if (Plan* known = found(batch, height, width, threads_)) {
    const auto at = std::find_if(plans_.begin(), plans_.end(), [=](const auto& p) { return p.get() == known; });
    std::rotate(plans_.begin(), at, at + 1);
    return *known;
  }
  auto plan = std::make_unique<Plan>();
  plan->batch = batch, plan->height = height, plan->width = width, plan->threads = threads_;
  make_values(*plan);
  plan->part = images_a_part(*plan);
  allocate(*plan, plan->part ? front_ : 0, (int)nodes_.size() + 1);
  for (size_t i = 0; i < nodes_.size(); ++i) make_step(*plan, (int)i);
  for (int thread = 0; plan->part && thread < threads_; ++thread) {
    plan->parts.push_back(std::make_unique<Plan>());
    Plan& own = *plan->parts.back();
    own.batch = plan->part, own.height = height, own.width = width, own.steps = plan->steps;
    make_values(own);
    allocate(own, 0, front_ + 1);  // its last value goes where the threads share it, but not while algorithms are measured
  }
  if (plans_.size() == kMostPlans) plans_.pop_back();
  plans_.insert(plans_.begin(), std::move(plan));
  return *plans_.front();
}

// 4 or 5 (kernels.h), or 0: not for this node.
int Network::winograd_side(const Plan& plan, int node) const {
  const NodeSpec& s = nodes_[node];
  const Value& in = plan.values[s.input + 1];
  // Fewer than 16 channels are not worth a transform; more than 35,000 could overflow.
  const bool possible = s.op == Op::kConv && s.ternary && s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1] &&
                        s.stride[0] <= 2 && s.c >= 16 && s.c < 35000 && s.pad_values.empty() && in.code_max <= 63 && !in.is_float;
  return !possible ? 0 : s.stride[0] == 1 ? 4 : 5;
}

void Network::make_values(Plan& plan) const {
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
      if (s.op == Op::kAvgPool && (int64_t)in.h * in.w > most_inputs(Weights::kSmall)) refuse(i, "averages too many pixels for 32-bit sums");
    }
    if (s.op == Op::kMaxPool) out.is_float = false, out.code_max = in.code_max;
    if (s.op == Op::kConv) {
      if (s.c != in.c) refuse(i, "expects " + std::to_string(s.c) + " channels and reads " + std::to_string(in.c));
      in.border = std::max(in.border, std::max(s.padding[0], s.padding[1]));
      if (winograd_side(plan, i)) {  // whole tiles read beyond the border where the output is odd
        const int last_row = s.stride[0] * (round_up(out.h, 2) - 1) + 2 - s.padding[0] - (in.h - 1);
        const int last_column = s.stride[0] * (round_up(out.w, 2) - 1) + 2 - s.padding[1] - (in.w - 1);
        in.extra = std::max({in.extra, last_row - in.border, last_column - in.border});
      }
    }
    if (s.op == Op::kLinear && s.c != in.c * in.h * in.w) refuse(i, "expects " + std::to_string(s.c) + " inputs and reads " + std::to_string(in.c * in.h * in.w));
    out.cs = out.is_float ? out.c : round_up(out.c, 4);
    if (s.residual != kNone) {
      const Value& r = plan.values[s.residual + 1];
      if (r.c != out.c || r.h != out.h || r.w != out.w) refuse(i, "adds a value of another shape");
    }
  }
}

// Buffers for values first ... end - 1. One is used again by a later value of exactly the same layout, so the border, written
// here, stays as it is.
void Network::allocate(Plan& plan, int first, int end) const {
  std::vector<int> last(plan.values.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    last[nodes_[i].input + 1] = i;
    if (nodes_[i].residual != kNone) last[nodes_[i].residual + 1] = i;
  }
  std::map<std::vector<int64_t>, std::vector<uint8_t*>> free_buffers;
  std::vector<std::vector<int64_t>> keys;
  for (int v = 0; v < end; ++v) {
    Value& value = plan.values[v];
    const uint8_t* pad = nullptr;
    bool zeros = false;
    for (const NodeSpec& s : nodes_) {
      if (s.input + 1 != v || s.op != Op::kConv || (s.padding[0] == 0 && s.padding[1] == 0)) continue;
      if (s.pad_values.empty()) zeros = true;
      else if (pad && std::memcmp(pad, s.pad_values.data(), value.c) != 0) throw std::invalid_argument("two convolutions pad one value differently");
      else pad = s.pad_values.data();
    }
    if (pad && zeros) throw std::invalid_argument("two convolutions pad one value differently");
    const int64_t elements = value.image() * value.n;
    const std::vector<int64_t> key = {value.h, value.w, value.c, value.border, value.extra, value.is_float, pad ? v : -1};
    keys.push_back(key);
    if (v < first) continue;
    auto& candidates = free_buffers[key];
    if (candidates.empty()) {
      const size_t bytes = elements * value.element_bytes() + 128;  // up to 63 bytes past a run are read: whole tiles, and vectors that gather
      plan.storage.emplace_back(bytes);                                // zeroed
      uint8_t* data = plan.storage.back().data();
      for (int64_t e = 0; pad && e < elements; e += value.cs) std::memcpy(data + e, pad, value.c);
      candidates.push_back(data);
    }
    value.data = candidates.back();
    candidates.pop_back();
    // Values that node v - 1 was the last to read are free from now on.
    for (int u = first; u < v; ++u)
      if (last[u] == v - 1) free_buffers[keys[u]].push_back(plan.values[u].data);
  }
}

void Network::make_step(Plan& plan, int node) {
  const NodeSpec& s = nodes_[node];
  const Value &in = plan.values[s.input + 1], &out = plan.values[node + 1];
  auto step = std::make_shared<Step>();
  plan.steps.push_back(step);
  step->epilogue.residual_gain = s.residual_gain, step->epilogue.relu = s.relu, step->epilogue.out_max = s.out_max;
  step->gain = s.gain, step->bias = s.bias;
  const int block = isa_.lanes * isa_.max_vectors;
  step->gain.resize(round_up(out.c, block), 0.0f);
  if (s.op == Op::kAvgPool) std::fill(step->gain.begin(), step->gain.end(), s.gain[0]);
  step->bias.resize(round_up(out.c, block), 0.0f);
  if (s.op == Op::kMaxPool || s.op == Op::kAvgPool) return;
  step->algorithm = Algorithm::kDirect;
  step->direct = panels(node, in);
  step->winograd_side = winograd_side(plan, node);
  const Value* residual = residual_of(plan, node);
  for (int y = 0; y < out.h; ++y)
    for (int x = 0; x < out.w; ++x) {
      step->in_offset.push_back(in.at(y * s.stride[0] - s.padding[0], x * s.stride[1] - s.padding[1]));
      step->out_offset.push_back(out.at(y, x) * out.element_bytes());
      step->residual_offset.push_back(residual ? residual->at(y, x) * residual->element_bytes() : 0);
    }
}

// Microseconds of each node in a run of the whole network: a node alone would find its weights in the caches, where in the network
// it does not. A node has ended when the first thread leaves it: a thread that the system had put aside finds all done and passes
// many at once. Of the front, every thread runs one part. The buffers hold whatever they hold.
std::vector<double> Network::time_nodes(Plan& plan) {
  using Clock = std::chrono::steady_clock;
  const size_t n = nodes_.size(), front = plan.part ? front_ : 0;
  std::vector<std::vector<Clock::time_point>> left(threads_, std::vector<Clock::time_point>(n + 1, Clock::time_point::max()));
  parallel(isa_, threads_, [&](Member& member) {
    std::vector<Clock::time_point>& times = left[member.index()];
    Member alone(member.index());
    times[0] = Clock::now();
    for (size_t i = 0; i < front; ++i) run_node(*plan.parts[member.index()], i, alone), times[i + 1] = Clock::now();
    for (size_t i = front; i < n; ++i) run_node(plan, i, member), times[i + 1] = Clock::now();
  });
  for (size_t i = 0; i <= n; ++i)
    for (int t = 1; t < threads_; ++t) left[0][i] = std::min(left[0][i], left[t][i]);
  std::vector<double> micros(n);
  for (size_t i = 0; i < n; ++i) {
    const double parts = i < front ? plan.batch / (double)(plan.part * threads_) : 1.0;
    micros[i] = std::chrono::duration<double, std::micro>(left[0][i + 1] - left[0][i]).count() * parts;
  }
  return micros;
}

// Notes in each step what its node takes by the first algorithm and by the second. Runs take turns, so that whatever else the
// machine does disturbs both; the second smallest of the runs counts, because all disturbances add time.
void Network::measure(Plan& plan, const std::vector<Algorithm> (&algorithms)[2]) {
  constexpr int kRuns = 9;
  std::vector<std::vector<double>> runs[2] = {std::vector<std::vector<double>>(nodes_.size()), std::vector<std::vector<double>>(nodes_.size())};
  for (int turn = 0; turn < 2 * kRuns; ++turn) {
    for (size_t i = 0; i < nodes_.size(); ++i) plan.steps[i]->algorithm = algorithms[turn % 2][i];
    const std::vector<double> micros = time_nodes(plan);
    for (size_t i = 0; i < nodes_.size(); ++i) runs[turn % 2][i].push_back(micros[i]);
  }
  for (int which = 0; which < 2; ++which)
    for (size_t i = 0; i < nodes_.size(); ++i) {
      std::vector<double>& micros = runs[which][i];
      std::sort(micros.begin(), micros.end());
      plan.steps[i]->micros[(int)algorithms[which][i]] = micros[1];
    }
}

// Every node direct, or what else it can be: Winograd, or skipping zero blocks where there are enough to try. The faster wins,
// node by node.
void Network::choose(Plan& plan, const std::string& algorithm) {
  if (algorithm == "direct") return;
  std::vector<Algorithm> algorithms[2];  // the plain ones, and the others
  size_t shared = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    Step& step = *plan.steps[i];
    algorithms[0].push_back(step.algorithm), algorithms[1].push_back(step.algorithm);
    const Value &in = plan.values[nodes_[i].input + 1], &out = plan.values[i + 1];
    if (algorithm != "winograd") step.sparse = sparse_panels(i, in, algorithm == "skipping" ? 0.0 : kLeastSkipped);
    if (step.sparse) algorithms[1][i] = Algorithm::kSkipping;
    if (!step.winograd_side || algorithm == "skipping") continue;
    // Groups of one size, the last of which may not be full. In a part one thread is alone and shares nothing.
    const int64_t tiles = (int64_t)in.n * ((out.h + 1) / 2) * ((out.w + 1) / 2) + isa_.tiles[step.winograd_side - 4] - 1;
    if (!plan.part || (int)i >= front_) shared = std::max(shared, (size_t)(tiles * (step.winograd_side * step.winograd_side * in.cs + 16)));
    step.winograd = winograd_panels(i, in, step.winograd_side);
    algorithms[1][i] = Algorithm::kWinograd;
  }
  plan.shared = Bytes(shared);
  if (algorithm == "auto") measure(plan, algorithms);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    Step& step = *plan.steps[i];
    const Algorithm plain = algorithms[0][i], other = algorithms[1][i];
    step.algorithm = step.micros[(int)other] <= step.micros[(int)plain] ? other : plain;  // unmeasured: the other
    if (step.algorithm == plain) step.winograd.reset(), step.sparse.reset();
  }
  if (std::none_of(plan.steps.begin(), plan.steps.end(), [](const auto& s) { return s->algorithm == Algorithm::kWinograd; })) plan.shared = Bytes();
}

std::vector<int64_t> Network::out_shape(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  Plan made;
  const Plan* plan = found(batch, height, width);
  if (!plan) {
    made.batch = batch, made.height = height, made.width = width;
    make_values(made);
    plan = &made;
  }
  const Value& last = plan->values.back();
  const Op op = nodes_.back().op;
  if (op == Op::kConv || op == Op::kMaxPool) return {last.n, last.c, last.h, last.w};
  return {last.n, last.c};
}

std::string Network::describe(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Plan* known = found(batch, height, width);
  if (!known) throw std::invalid_argument("no batch of " + std::to_string(batch) + " images of " + std::to_string(height) + " x " + std::to_string(width) + " has run lately");
  const Plan& p = *known;
  static const char* ops[] = {"conv", "linear", "max_pool", "avg_pool"};
  static const char* algorithms[] = {"direct", "winograd", "skipping", "pool"};
  std::ostringstream text;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Step& step = *p.steps[i];
    const Value& out = p.values[i + 1];
    const NodeSpec& s = nodes_[i];
    const Value& in = p.values[s.input + 1];
    int64_t macs = (int64_t)s.n * s.c * out.n;  // pools: 0
    if (s.op == Op::kConv) macs *= taps(in.h, out.h, s.kernel[0], s.stride[0], s.padding[0]) * taps(in.w, out.w, s.kernel[1], s.stride[1], s.padding[1]);
    const double plain = step.micros[(int)(step.algorithm == Algorithm::kPool ? Algorithm::kPool : Algorithm::kDirect)];
    text << i << ' ' << ops[(int)s.op] << ' ' << algorithms[(int)step.algorithm] << ' ' << plain << ' '
         << step.micros[(int)Algorithm::kWinograd] << ' ' << step.micros[(int)Algorithm::kSkipping] << ' ' << macs << '\n';
  }
  return text.str();
}

}  // namespace ternary
