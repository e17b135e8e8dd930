// The helpers spin for some microseconds after each piece of work, because the next one of a step follows at once, and
// then sleep: an idle process uses no processor time.
#include "team.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvasir {
namespace {

constexpr int kSpins = 1000;       // about 20 microseconds
constexpr int kSpinsToYield = 200;  // the caller waits for a helper that may have lost its core

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// What can be claimed, in one word, so that a claim and the work it belongs to cannot be taken apart: how many helpers may
// join, the number of tasks and the next one. A claimed task keeps the caller from publishing other work.
struct Cursor {
  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;

  static uint64_t make(uint64_t helpers, uint64_t count) { return helpers << (2 * kBits) | count << kBits; }
  static int64_t helpers(uint64_t word) { return int64_t(word >> (2 * kBits)); }
  static int64_t index(uint64_t word) { return int64_t(word & kMask); }
  static bool has_task(uint64_t word) { return (word & kMask) < ((word >> kBits) & kMask); }
};

constexpr int64_t kMaxTasks = int64_t(1) << (Cursor::kBits - 1);
constexpr int64_t kMaxHelpers = 255;

class Team {
 public:
  // Never destroyed: helpers may still sleep in it when the process ends.
  static Team& get() {
    static Team* team = new Team;
    return *team;
  }

  // False, with nothing done, while another thread uses the team.
  bool run(int64_t count, int64_t threads, TaskCall call, const void* task) {
    if (is_used_.exchange(true, std::memory_order_acquire)) return false;
    const int64_t helpers = std::min(threads - 1, kMaxHelpers);
    start_helpers(helpers);
    call_ = call;
    task_ = task;
    num_done_.store(0, std::memory_order_relaxed);
    cursor_.store(Cursor::make(helpers, count));
    if (num_asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      if (helpers == 1)
        work_.notify_one();
      else
        work_.notify_all();
    }
    while (work_on_one()) {
    }
    for (int spins = 0; num_done_.load(std::memory_order_acquire) < count; ++spins)
      spins < kSpinsToYield ? pause() : std::this_thread::yield();
    is_used_.store(false, std::memory_order_release);
    return true;
  }

 private:
  bool work_on_one() {
    if (!Cursor::has_task(cursor_.load(std::memory_order_relaxed))) return false;
    const uint64_t claim = cursor_.fetch_add(1, std::memory_order_acquire);
    if (!Cursor::has_task(claim)) return false;
    call_(task_, Cursor::index(claim));
    num_done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool is_wanted(int64_t helper) const {
    const uint64_t word = cursor_.load();
    return helper < Cursor::helpers(word) && Cursor::has_task(word);
  }

  void start_helpers(int64_t count) {
    for (; num_helpers_ < count; ++num_helpers_) std::thread(&Team::help, this, num_helpers_).detach();
  }

  void help(int64_t self) {
    for (int idle = 0;; ++idle) {
      if (is_wanted(self) && work_on_one()) {
        idle = 0;
      } else if (idle < kSpins) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1);  // before the last look: whoever publishes after it sees a sleeper
        work_.wait(lock, [&] { return is_wanted(self); });
        num_asleep_.fetch_sub(1);
        idle = 0;
      }
    }
  }

  std::atomic<uint64_t> cursor_{0};
  std::atomic<int64_t> num_done_{0};
  std::atomic<int64_t> num_asleep_{0};
  std::atomic<bool> is_used_{false};
  TaskCall call_ = nullptr;
  const void* task_ = nullptr;
  int64_t num_helpers_ = 0;
  std::mutex mutex_;
  std::condition_variable work_;
};

}  // namespace

void run_on_team(int64_t count, int64_t threads, TaskCall call, const void* task) {
  if (threads > 1 && count > 1 && count <= kMaxTasks && Team::get().run(count, threads, call, task)) return;
  for (int64_t i = 0; i < count; ++i) call(task, i);
}

}  // namespace kvasir
