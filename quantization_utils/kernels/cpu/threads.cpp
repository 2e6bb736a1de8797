#include "threads.h"

#include <pthread.h>
#include <sched.h>

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

#if defined(__linux__)
int processor() { return sched_getcpu(); }

// This thread, one of so many, goes on on another processor if there is one for each; it may come back.
void leave_processor(int threads) {
  cpu_set_t all, others;
  if (sched_getaffinity(0, sizeof(all), &all) || CPU_COUNT(&all) < threads) return;
  others = all;
  CPU_CLR(processor(), &others);
  sched_setaffinity(0, sizeof(others), &others);
  sched_setaffinity(0, sizeof(all), &all);
}
#else
int processor() { return -1; }
void leave_processor(int) {}
#endif

// The kernel of a virtual machine takes a processor that sleeps for one that it may not use, and wakes a thread that was asleep on the
// one that wakes it. There it would get nowhere for milliseconds, while the other first works and then spins for it in OpenMP. So that
// one lets it come, once, and it moves to another processor.
void spread(Team& team, int index) {
  constexpr int kSpins = 200;  // a thread that is awake comes sooner
  const auto all_here = [&] { return team.arrived.value.load(std::memory_order_relaxed) >= team.size; };
  team.arrived.value.fetch_add(1, std::memory_order_relaxed);
  if (index > 0) {
    if (processor() == team.first_processor) leave_processor(team.size);
    return;
  }
  for (int spins = 0; spins < kSpins && !all_here(); ++spins) relax();
  if (!all_here()) std::this_thread::yield();
}

void run(Team& team, const std::function<void(Member&)>& body) {
#if defined(_OPENMP)
  if (!forked) {
    // Fewer threads than asked for are fine: the items are shared among those that come.
#pragma omp parallel num_threads(team.size)
    {
      const int index = omp_get_thread_num();
      spread(team, index);
      Member member(team, index);
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
  team->size = std::min(threads, kMaxThreads), team->arrived.value = 0, team->first_processor = processor();
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
