// One team of threads for all kernels. Tasks are claimed one by one, by the caller too, so nobody ever waits for a thread
// to start: where the other cores are taken, the caller does all the work itself, and loses only the call that would have
// woken a helper. (An OpenMP region waits for its threads; with another process on a core that took milliseconds.)
#pragma once

#include <cstdint>

namespace kvasir {

using TaskCall = void (*)(const void* task, int64_t index);

// Calls call(task, i) once for each i in [0, count), on up to `threads` threads, and returns when all are done. What one
// call writes, the caller may read afterwards. Runs on the calling thread alone while the team is in use.
void run_on_team(int64_t count, int64_t threads, TaskCall call, const void* task);

// task(i) for each i in [0, count).
template <class Task>
void parallel_for(int64_t count, int64_t threads, const Task& task) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  run_on_team(count, threads, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
}

// task(i) for each i in [0, count), in runs of neighbours that are worth a thread. `work` is what one index costs, in any
// unit of which `enough` pay for a thread.
template <class Task>
void parallel_for_runs(int64_t count, int64_t work, int64_t enough, int64_t threads, const Task& task) {
  const int64_t useful = work * count / enough;
  if (useful < threads) threads = useful;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  const int64_t runs = count < 4 * threads ? count : 4 * threads;  // four each: whoever is faster takes more
  parallel_for(runs, threads, [&](int64_t run) {
    for (int64_t i = count * run / runs; i < count * (run + 1) / runs; ++i) task(i);
  });
}

}  // namespace kvasir
