#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace ternary {
namespace {

constexpr int kSpinsBeforeYield = 1000;   // some tens of microseconds: longer than an item
constexpr int kSpinsBeforeSleep = 10000;  // between two calls of a network

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Pool {
  Team team;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> epoch{0};  // a new value starts a region
  const std::function<void(Member&)>* body = nullptr;
  std::atomic<int> busy{0};
  int workers = 0, used_phases = 0;
  pid_t owner = getpid();

  void work(int index, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (epoch.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpinsBeforeSleep) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
      }
      // The size is written before the epoch, and no region starts before every worker of the last has left it; a worker
      // that is not needed may be late, which is why it counts as busy too.
      seen = epoch.load(std::memory_order_acquire);
      if (index < team.size) {
        Member member(team, index);
        (*body)(member);
      }
      busy.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void run(int threads, const std::function<void(Member&)>& function) {
    threads = std::max(1, std::min(threads, kMaxThreads));
    for (; workers < threads - 1; ++workers)
      std::thread(&Pool::work, this, workers + 1, epoch.load()).detach();
    team.size = threads;
    for (int i = 0; i < used_phases; ++i) team.phases[i].next.store(0), team.phases[i].done.store(0);
    Member self(team, 0);
    if (threads > 1) {
      body = &function;
      busy.store(workers, std::memory_order_relaxed);
      {
        std::lock_guard<std::mutex> lock(mutex);
        epoch.fetch_add(1, std::memory_order_release);
      }
      wake.notify_all();
    }
    function(self);
    used_phases = self.phases();
    if (threads > 1) {
      for (int spins = 0; busy.load(std::memory_order_acquire) != 0;)
        ++spins < kSpinsBeforeYield ? relax() : std::this_thread::yield();
    }
  }
};

}  // namespace

void Member::wait(Team::Phase& phase, int64_t items) {
  for (int spins = 0; phase.done.load(std::memory_order_acquire) < items;)
    ++spins < kSpinsBeforeYield ? relax() : std::this_thread::yield();
}

void parallel(int threads, const std::function<void(Member&)>& body) {
  // Never destroyed: the workers outlive main(). A forked child has none of the parent's threads and starts afresh.
  static std::mutex* region = new std::mutex;
  static Pool* pool = nullptr;
  if (pool != nullptr && pool->owner != getpid()) {
    region = new std::mutex;
    pool = nullptr;
  }
  std::lock_guard<std::mutex> one_at_a_time(*region);
  if (pool == nullptr) pool = new Pool;
  pool->run(threads, body);
}

}  // namespace ternary
