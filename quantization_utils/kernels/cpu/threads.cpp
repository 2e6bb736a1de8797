#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ternary {
namespace {

constexpr int kSpinsBeforeYield = 1000;  // some tens of microseconds: longer than an item

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Never destroyed: a call may be running while the process ends.
std::mutex* region = new std::mutex;
Team* team = nullptr;
bool forked = false;

// A child has none of its parent's OpenMP threads, whoever woke them, and what its parent's regions left is of no use to it. It
// has one thread now, so nothing here needs a lock. A network or layer that another thread was running meanwhile stays locked: what
// the child uses, it has to load itself.
void start_as_child() { region = new std::mutex, team = nullptr, forked = true; }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, start_as_child);

void run_on_new_threads(Team& team, const std::function<void(Member&)>& body) {
  std::vector<std::thread> others;
  for (int index = 1; index < team.size; ++index)
    try {
      others.emplace_back([&team, &body, index] { Member member(team, index); body(member); });
    } catch (const std::system_error&) {
      break;  // no more to be had: the items are shared among fewer
    }
  Member self(team, 0);
  body(self);
  for (std::thread& other : others) other.join();
}

void run(Team& team, const std::function<void(Member&)>& body) {
#if defined(_OPENMP)
  if (!forked) {
    // Fewer threads than asked for are fine: the items are shared among those that come.
#pragma omp parallel num_threads(team.size)
    {
      Member member(team, omp_get_thread_num());
      body(member);
    }
    return;
  }
#endif
  run_on_new_threads(team, body);
}

// What an instruction set needs around its kernels, whichever way these end.
struct State {
  explicit State(const Kernels& isa) : isa(isa) { isa.begin(); }
  ~State() { isa.end(); }
  const Kernels& isa;
};

}  // namespace

void Member::wait(Team::Phase& phase, int64_t items) {
  for (int spins = 0; phase.done.value.load(std::memory_order_acquire) < items;)
    ++spins < kSpinsBeforeYield ? relax() : std::this_thread::yield();
}

void parallel(const Kernels& isa, int threads, const std::function<void(Member&)>& body) {
  if (threads <= 1) {  // needs no team, and keeps nobody else from theirs
    Member alone(0);
    const State state(isa);
    return body(alone);
  }
  std::lock_guard<std::mutex> one_at_a_time(*region);
  if (!team) team = new Team;
  team->size = std::min(threads, kMaxThreads);
  for (Team::Phase& phase : team->phases) {
    if (phase.next[0].value.load(std::memory_order_relaxed) == 0) break;  // phases are used in order, all queues of each
    for (Team::Counter& next : phase.next) next.value.store(0, std::memory_order_relaxed);
    phase.done.value.store(0, std::memory_order_relaxed);
  }
  run(*team, [&](Member& member) {
    const State state(isa);
    body(member);
  });
}

}  // namespace ternary
