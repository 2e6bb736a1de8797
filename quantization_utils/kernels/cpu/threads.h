// One parallel region for a whole network: threads that stay awake between its phases. A thread pool's wake-up costs as much
// as a layer; a meeting of running threads costs a fraction of a microsecond.
//
// A phase ends when its items are done, not when every thread has arrived: a thread that the system has put aside holds
// nobody up unless it has begun with the phase, and catches up when it returns. That matters on a busy machine.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

#include "kernels.h"

namespace ternary {

constexpr int kMaxThreads = 256;
constexpr int kMaxPhases = 2048;  // in one region; who shares more often than a few times checks it when constructed
constexpr int kQueues = 4;        // of items in a phase: threads begin with different ones, and help with the others' then

struct Team {
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct Phase {
    Counter next[kQueues], done;
  };
  int size = 1, first_processor = -1;  // the processor: that of thread 0
  Counter arrived;
  Phase phases[kMaxPhases];
};

// One thread's view of a region. Every member must make the same calls of share.
class Member {
 public:
  Member(Team& team, int index) : team_(&team), index_(index) {}
  explicit Member(int index) : team_(nullptr), index_(index) {}  // shares with nobody: within an item of a region
  int index() const { return index_; }
  int team_size() const { return team_ ? team_->size : 1; }

  // Calls work(item) for every item of 0 … items-1, each once, spread over the threads as they come free; returns when all
  // items are done. A thread takes the same stretch of them first in every phase: what it wrote before is in its own cache.
  template <typename Work>
  void share(int64_t items, const Work& work) {
    if (team_size() == 1) {
      for (int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    Team::Phase& phase = team_->phases[phase_++];
    const int queues = team_size() < kQueues ? team_size() : kQueues;
    int64_t done = 0;
    for (int i = 0; i < queues; ++i) {
      const int queue = (index_ + i) % queues;
      const int64_t first = items * queue / queues, end = items * (queue + 1) / queues;
      for (int64_t item; (item = first + phase.next[queue].value.fetch_add(1, std::memory_order_relaxed)) < end; ++done) work(item);
    }
    if (phase.done.value.fetch_add(done, std::memory_order_acq_rel) + done < items) wait(phase, items);
  }

 private:
  static void wait(Team::Phase& phase, int64_t items);
  Team* team_;
  int index_, phase_ = 0;
};

// Runs body(member) on `threads` threads (the caller is one) and returns when all are done; at most kMaxPhases phases. One
// region at a time. The threads are OpenMP's, which are PyTorch's own: a second pool would fight with them for the cores,
// each spinning for work that comes to the other. After fork(), and without OpenMP, threads are made for each region.
// A body must not throw where there are several threads: that ends the process.
void parallel(const Kernels& isa, int threads, const std::function<void(Member&)>& body);

}  // namespace ternary
