// The measured choice of an algorithm for each node.
#include <algorithm>
#include <chrono>

#include "run.h"

namespace ternary {
namespace {

// The fraction of zero blocks from which skipping is measured: with fewer it never won.
constexpr double kLeastSkipped = 0.125;

// Microseconds of each node in a run of the whole network: a node alone would find its weights in the caches, where in the network
// it does not. A node has ended when the first thread leaves it: a thread that the system had put aside finds all done and passes
// many at once. Of the front, every thread runs one part. The buffers hold whatever they hold.
std::vector<double> time_nodes(const Model& model, Plan& plan, std::vector<Bytes>& scratch) {
  using Clock = std::chrono::steady_clock;
  const int n = (int)model.nodes.size();
  std::vector<std::vector<Clock::time_point>> left(plan.threads, std::vector<Clock::time_point>(n + 1, Clock::time_point::max()));
  parallel(model.isa, plan.threads, [&](Member& member) {
    std::vector<Clock::time_point>& times = left[member.index()];
    Bytes& own = scratch[member.index()];
    Member alone(member.index());
    times[0] = Clock::now();
    for (int i = 0; i < plan.front; ++i) run_node(model, plan, plan.parts[member.index()], i, {alone, own}), times[i + 1] = Clock::now();
    for (int i = plan.front; i < n; ++i) run_node(model, plan, plan.whole, i, {member, own}), times[i + 1] = Clock::now();
  });
  for (int i = 0; i <= n; ++i)
    for (int t = 1; t < plan.threads; ++t) left[0][i] = std::min(left[0][i], left[t][i]);
  std::vector<double> micros(n);
  for (int i = 0; i < n; ++i) {
    const double parts = i < plan.front ? plan.batch / (double)(plan.part * plan.threads) : 1.0;
    micros[i] = std::chrono::duration<double, std::micro>(left[0][i + 1] - left[0][i]).count() * parts;
  }
  return micros;
}

// Notes in each step what its node takes by the first algorithm and by the second. Runs take turns, so that whatever else the
// machine does disturbs both; the second smallest of the runs counts, because all disturbances add time.
void measure(const Model& model, const std::vector<Algorithm> (&algorithms)[2], std::vector<Bytes>& scratch, Plan& plan) {
  constexpr int kRuns = 9;
  const size_t n = model.nodes.size();
  std::vector<std::vector<double>> runs[2] = {std::vector<std::vector<double>>(n), std::vector<std::vector<double>>(n)};
  for (int turn = 0; turn < 2 * kRuns; ++turn) {
    for (size_t i = 0; i < n; ++i) plan.steps[i].algorithm = algorithms[turn % 2][i];
    const std::vector<double> micros = time_nodes(model, plan, scratch);
    for (size_t i = 0; i < n; ++i) runs[turn % 2][i].push_back(micros[i]);
  }
  for (int which = 0; which < 2; ++which)
    for (size_t i = 0; i < n; ++i) {
      std::vector<double>& micros = runs[which][i];
      std::sort(micros.begin(), micros.end());
      plan.steps[i].micros[(int)algorithms[which][i]] = micros[1];
    }
}

// Bytes of the transformed input of all tiles, in groups of one size, the last of which may not be full.
size_t transformed_bytes(const Kernels& isa, int side, const Value& in, const Value& out) {
  const int64_t tiles = (int64_t)in.n * ((out.h + 1) / 2) * ((out.w + 1) / 2) + isa.tiles[side - 4] - 1;
  return tiles * (side * side * in.cs + 4 * sizeof(int32_t));
}

}  // namespace

void choose_algorithms(const Model& model, PackedWeights& weights, const std::string& algorithm, std::vector<Bytes>& scratch, Plan& plan) {
  if (algorithm == "direct") return;
  std::vector<Algorithm> algorithms[2];  // the plain ones; Winograd's, or skipping zero blocks where there are enough to try
  size_t shared = 0;
  for (size_t i = 0; i < model.nodes.size(); ++i) {
    Step& step = plan.steps[i];
    const Value &in = plan.whole.values[model.nodes[i].input + 1], &out = plan.whole.values[i + 1];
    algorithms[0].push_back(step.algorithm), algorithms[1].push_back(step.algorithm);
    if (algorithm != "winograd") step.sparse = weights.skipping(i, in, algorithm == "skipping" ? 0.0 : kLeastSkipped);
    if (step.sparse) algorithms[1][i] = Algorithm::kSkipping;
    if (!step.winograd_side || algorithm == "skipping") continue;
    if ((int)i >= plan.front) shared = std::max(shared, transformed_bytes(model.isa, step.winograd_side, in, out));  // in a part one thread is alone
    step.winograd = weights.winograd(i, in, step.winograd_side);
    algorithms[1][i] = Algorithm::kWinograd;
  }
  plan.shared = Bytes(shared);
  if (algorithm == "auto") measure(model, algorithms, scratch, plan);
  for (size_t i = 0; i < model.nodes.size(); ++i) {
    Step& step = plan.steps[i];
    const Algorithm plain = algorithms[0][i], other = algorithms[1][i];
    step.algorithm = step.micros[(int)other] <= step.micros[(int)plain] ? other : plain;  // unmeasured: the other
    if (step.algorithm == plain) step.winograd.reset(), step.sparse.reset();
  }
  if (std::none_of(plan.steps.begin(), plan.steps.end(), [](const Step& s) { return s.algorithm == Algorithm::kWinograd; })) plan.shared = Bytes();
}

}  // namespace ternary
