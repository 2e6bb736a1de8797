// The measured choice of an algorithm for each node.
#include <algorithm>
#include <chrono>

#include "run.h"

namespace ternary {
namespace {

// The fraction of zero blocks from which skipping is measured: with fewer it never won.
constexpr double kLeastSkipped = 0.125;

// Microseconds of each node in a run of the whole network: a node alone would find its weights in the caches, where in the network
// it does not. A node begins when the first thread enters it and ends when the first one leaves it: a thread that the system had put
// aside finds all done and passes many at once. Of a stage in parts every thread runs two, where it has as many, and the second
// counts: it finds what the first left in the caches, as most do. The buffers hold whatever they hold.
std::vector<double> time_nodes(const Model& model, Plan& plan, std::vector<Bytes>& scratch) {
  using Clock = std::chrono::steady_clock;
  const size_t n = model.nodes.size();
  struct Times {
    std::vector<Clock::time_point> enter, leave;
  };
  std::vector<Times> times(plan.threads, {std::vector(n, Clock::time_point::max()), std::vector(n, Clock::time_point::max())});
  parallel(model.isa, plan.threads, [&](Member& member) {
    const int index = member.index();
    Member alone(index);
    const auto run = [&](const Stage& stage, const Buffers& buffers, Member& who) {
      for (int i = stage.first; i < stage.end; ++i) {
        times[index].enter[i] = Clock::now();
        run_node(model, plan, buffers, i, {who, scratch[index]});
        times[index].leave[i] = Clock::now();
      }
    };
    for (Stage& stage : plan.stages) {
      const int parts = stage.part ? (plan.batch + stage.part - 1) / stage.part : 0;
      for (int part = index; part < parts && part < index + 2 * plan.threads; part += plan.threads) {
        enter_part(plan, stage, part, stage.parts[index]);
        run(stage, stage.parts[index], alone);
      }
      if (!stage.part) run(stage, plan.whole, member);
    }
  });
  std::vector<double> micros(n);
  for (const Stage& stage : plan.stages)
    for (int i = stage.first; i < stage.end; ++i) {
      for (const Times& t : times) times[0].enter[i] = std::min(times[0].enter[i], t.enter[i]), times[0].leave[i] = std::min(times[0].leave[i], t.leave[i]);
      const double parts = stage.part ? plan.batch / (double)(stage.part * plan.threads) : 1.0;
      micros[i] = std::chrono::duration<double, std::micro>(times[0].leave[i] - times[0].enter[i]).count() * parts;
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

int64_t tiles_of(int side, int images, const Value& out) {
  const int outputs = winograd_outputs(side);
  return (int64_t)images * (round_up(out.h, outputs) / outputs) * (round_up(out.w, outputs) / outputs);
}

// Bytes of the transformed input of all tiles, in groups of one size, the last of which may not be full.
size_t transformed_bytes(const Kernels& isa, int side, const Value& in, const Value& out) {
  const int64_t tiles = tiles_of(side, in.n, out) + isa.tiles[side - 4] - 1;
  return tiles * (side * side * in.cs * winograd_element_bytes(side) + 4 * sizeof(int32_t));
}

}  // namespace

void choose_algorithms(const Model& model, PackedWeights& weights, const std::string& algorithm, std::vector<Bytes>& scratch, Plan& plan) {
  if (algorithm == "direct") return;
  std::vector<Algorithm> algorithms[2];  // the plain ones; Winograd's, or skipping zero blocks where there are enough to try
  size_t shared = 0;
  for (const Stage& stage : plan.stages)
    for (int i = stage.first; i < stage.end; ++i) {
      Step& step = plan.steps[i];
      const Value &in = plan.whole.values[model.nodes[i].input + 1], &out = plan.whole.values[i + 1];
      algorithms[0].push_back(step.algorithm), algorithms[1].push_back(step.algorithm);
      if (algorithm != "winograd") step.sparse = weights.skipping(i, in, algorithm == "skipping" ? 0.0 : kLeastSkipped);
      if (step.sparse) algorithms[1][i] = Algorithm::kSkipping;
      const int side = step.winograd_side;
      if (!side || algorithm == "skipping") continue;
      // Its weights are sixteen times the plain algorithm's: for so few tiles they would only drive others from the caches.
      if (side == 6 && algorithm == "auto" && tiles_of(side, stage.part ? stage.part : plan.batch, out) < model.isa.tiles[side - 4]) continue;
      if (!stage.part) shared = std::max(shared, transformed_bytes(model.isa, side, in, out));
      step.winograd = weights.winograd(i, in, side);
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
  weights.forget_unused();
}

}  // namespace ternary
