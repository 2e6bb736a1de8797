// Running a plan: what every thread of a parallel region calls. One or two shared phases a node.
#pragma once
#include <vector>

#include "plan.h"
#include "threads.h"

namespace ternary {

constexpr int kMostPhasesANode = 2;

// A thread of the region, and memory of its own that outlasts it.
struct Worker {
  Member& member;
  Bytes& scratch;
  uint8_t* room(size_t bytes) const {
    if (scratch.size() < bytes) scratch = Bytes(bytes);
    return scratch.data();
  }
};

// All nodes, from images: float32 planes (batch, channels, height, width).
void run_plan(const Model& model, Plan& plan, const float* images, const Worker& worker);

// One node, from and to values of `buffers`: the plan's whole ones, or those of one of its parts.
void run_node(const Model& model, Plan& plan, const Buffers& buffers, int node, const Worker& worker);

// A node with all that computing it needs.
struct Task {
  const Kernels& isa;
  const Node& node;
  const Step& step;
  const Value &in, &out;
  const Value* residual;  // null: none
  Worker worker;
  uint8_t* shared;        // the plan's
};

void run_winograd(const Task& task);

// Items a thread should find per phase, so that an uneven finish costs little.
int64_t team_chunk(int64_t groups, int blocks, int threads, int64_t most);

// Null: no residual.
inline void set_residual(Output& to, const Value* residual) {
  to.has_residual = residual != nullptr, to.residual_is_float = residual && residual->is_float;
}

}  // namespace ternary
