#include "network.h"

#include <limits>
#include <sstream>
#include <stdexcept>

namespace ternary {
namespace {

// Plans that are kept: each has buffers of its own.
constexpr size_t kMostPlans = 16;

constexpr size_t kMostNodes = (kMaxPhases - 1) / kMostPhasesANode;  // of one region; the image takes one phase

// Kernels read as much as a node's numbers say.
void check(const Node& s, int i) {
  const bool conv = s.op == Op::kConv, product = conv || s.op == Op::kLinear, slides = conv || s.op == Op::kMaxPool;
  if (s.input < kImage || s.input >= i) refuse(i, "reads no earlier node");
  if (s.residual && (*s.residual < 0 || *s.residual >= i)) refuse(i, "adds what is no earlier node");
  for (int d = 0; d < 2; ++d) {
    if (s.kernel[d] < 1 || s.stride[d] < 1 || s.padding[d] < 0) refuse(i, "has no such kernel, stride or padding");
    if (s.op == Op::kMaxPool && 2 * s.padding[d] > s.kernel[d]) refuse(i, "pads more than half of its kernel");
    if (!slides && (s.kernel[d] > 1 || s.stride[d] > 1 || s.padding[d])) refuse(i, "has a kernel, stride or padding, and takes its whole input");
  }
  if (product && (int64_t)s.codes.size() != (int64_t)s.n * s.c * (conv ? s.kernel[0] * s.kernel[1] : 1)) refuse(i, "has codes of another shape");
  if (product && (s.gain.size() != (size_t)s.n || s.bias.size() != (size_t)s.n)) refuse(i, "has not one gain and one bias for each channel");
  if (s.out_max && (*s.out_max < 1 || *s.out_max > 255)) refuse(i, "puts out codes that no byte holds");
  if (s.op == Op::kAvgPool && s.gain.size() != 1) refuse(i, "has not one gain");
  if (!product && (!s.bias.empty() || s.residual)) refuse(i, "adds something to a pool");
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

// Without pools, which have none.
int64_t multiply_adds(const Node& s, const Value& in, const Value& out) {
  const int64_t of_a_tap = (int64_t)s.n * s.c * out.n;
  if (s.op != Op::kConv) return of_a_tap;
  return of_a_tap * taps(in.h, out.h, s.kernel[0], s.stride[0], s.padding[0]) * taps(in.w, out.w, s.kernel[1], s.stride[1], s.padding[1]);
}

// Whether any is not a number. In integers, which the compiler counts a vector at a time.
bool any_nan(const float* x, int64_t count) {
  int any = 0;
  for (int64_t i = 0; i < count; ++i) any |= x[i] != x[i];
  return any != 0;
}

// From NHWC with a border, bytes or float32, to planes of float32.
void copy_planes(const Value& from, float* out) {
  for (int b = 0; b < from.n; ++b)
    for (int y = 0; y < from.h; ++y)
      for (int x = 0; x < from.w; ++x)
        for (int c = 0; c < from.c; ++c) {
          const uint8_t* element = from.element(b, from.at(y, x) + c);
          out[(((int64_t)b * from.c + c) * from.h + y) * from.w + x] = from.is_float ? *(const float*)element : (float)*element;
        }
}

}  // namespace

void refuse(int node, const std::string& why) { throw std::invalid_argument("node " + std::to_string(node) + " " + why); }

Network::Network(const Kernels& isa, std::string algorithm, int image_channels) : model_{isa, image_channels, {}}, algorithm_(std::move(algorithm)) {}

void Network::add(Node node) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!plans_.empty()) throw std::invalid_argument("a network that has run takes no more nodes");
  if (model_.nodes.size() == kMostNodes)
    throw std::invalid_argument("a network of more than " + std::to_string(kMostNodes) + " nodes does not fit in one parallel region");
  check(node, (int)model_.nodes.size());
  model_.nodes.push_back(std::move(node));
}

void Network::run(const float* images, int batch, int height, int width, int threads, float* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  threads = std::max(1, std::min(threads, kMaxThreads));
  if ((int)scratch_.size() < threads) scratch_.resize(threads);
  Plan& p = plan(batch, height, width, threads);
  parallel(model_.isa, threads, [&](Member& member) { run_plan(model_, p, images, {member, scratch_[member.index()]}); });
  const Value& last = p.whole.values.back();
  copy_planes(last, out);
  // A byte cannot say that a pixel is not a number: all of its image's outputs do.
  const int64_t image_floats = (int64_t)model_.image_channels * height * width, out_floats = (int64_t)last.c * last.h * last.w;
  for (int b = 0; b < batch; ++b)
    if (any_nan(images + b * image_floats, image_floats)) std::fill_n(out + b * out_floats, out_floats, std::numeric_limits<float>::quiet_NaN());
}

std::list<Plan>::iterator Network::find(int batch, int height, int width, int threads) {
  return std::find_if(plans_.begin(), plans_.end(), [=](const Plan& p) {
    return p.batch == batch && p.height == height && p.width == width && (threads == 0 || p.threads == threads);
  });
}

Plan& Network::plan(int batch, int height, int width, int threads) {
  const auto known = find(batch, height, width, threads);
  if (known != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, known);
    return plans_.front();
  }
  Plan made = make_plan(model_, weights_, batch, height, width, threads);
  choose_algorithms(model_, weights_, algorithm_, scratch_, made);
  if (plans_.size() == kMostPlans) plans_.pop_back();
  plans_.push_front(std::move(made));
  return plans_.front();
}

std::vector<int64_t> Network::out_shape(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto known = find(batch, height, width, 0);
  const Value last = known != plans_.end() ? known->whole.values.back() : shapes(model_, batch, height, width).back();
  const Op op = model_.nodes.back().op;
  if (op == Op::kConv || op == Op::kMaxPool) return {last.n, last.c, last.h, last.w};
  return {last.n, last.c};
}

std::string Network::describe(int batch, int height, int width) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto known = find(batch, height, width, 0);
  if (known == plans_.end())
    throw std::invalid_argument("no batch of " + std::to_string(batch) + " images of " + std::to_string(height) + " x " + std::to_string(width) + " has run lately");
  std::ostringstream text;
  const std::vector<Value>& values = known->whole.values;
  for (const Stage& stage : known->stages)
    for (int i = stage.first; i < stage.end; ++i) {
      const Node& s = model_.nodes[i];
      const Step& step = known->steps[i];
      const auto micros = [&](Algorithm algorithm) { return step.micros[(int)algorithm]; };
      text << i << ' ' << kOpNames[(int)s.op] << ' ' << kAlgorithmNames[(int)step.algorithm] << ' '
           << micros(step.algorithm == Algorithm::kPool ? Algorithm::kPool : Algorithm::kDirect) << ' ' << micros(Algorithm::kWinograd) << ' '
           << micros(Algorithm::kSkipping) << ' ' << multiply_adds(s, values[s.input + 1], values[i + 1]) << ' ' << stage.part << '\n';
    }
  return text.str();
}

}  // namespace ternary
