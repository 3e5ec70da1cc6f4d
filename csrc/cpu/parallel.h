// Threads. The only place that knows OpenMP. With -DQK_STD_THREADS threads are std::thread's instead, made for each
// call: for ThreadSanitizer, which does not see OpenMP's synchronization.
#pragma once

#include "ops.h"

#if defined(QK_STD_THREADS)
#include <atomic>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// A region's work on one of its threads, out of which nothing is thrown.
template <class Work>
static inline void keeping(QkFault* fault, const Work& work) {
  try {
    work();
  } catch (...) {
    qk_keep(fault);
  }
}

#if defined(QK_STD_THREADS)
// work(0) .. work(threads - 1), each on a thread of its own.
template <class Work>
static inline void on_threads(std::int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  for (std::int64_t me = 1; me < threads; ++me) others.emplace_back([&work, me] { work(me); });
  work(0);
  for (std::thread& other : others) other.join();
}
#endif

// body(begin, end) over contiguous shares of 0..count. At least `grain` items a thread, so that small work stays on
// one.
template <class Body>
static inline void parallel_for(int threads, std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  threads = qk_usable_threads(threads);
  std::int64_t shares = grain > 0 ? (count + grain - 1) / grain : count;
  if (shares > threads) shares = threads;
  if (shares <= 1) {
    body(std::int64_t{0}, count);
    return;
  }
  QkFault* const fault = qk_fault();
#if defined(QK_STD_THREADS)
  on_threads(shares,
             [&](std::int64_t me) { keeping(fault, [&] { body(count * me / shares, count * (me + 1) / shares); }); });
#elif defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(shares))
  {
    const std::int64_t all = omp_get_num_threads(), me = omp_get_thread_num();
    const std::int64_t begin = count * me / all, end = count * (me + 1) / all;
    if (begin < end) keeping(fault, [&] { body(begin, end); });
  }
#else
  body(std::int64_t{0}, count);
#endif
  qk_throw(fault);
}

// body(task) for every task in 0..count, each taken by the next free thread: for uneven tasks and for machines that are
// shared.
template <class Body>
static inline void parallel_tasks(int threads, std::int64_t count, const Body& body) {
  threads = qk_usable_threads(threads);
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (std::int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  QkFault* const fault = qk_fault();
#if defined(QK_STD_THREADS)
  std::atomic<std::int64_t> next{0};
  on_threads(threads, [&](std::int64_t) {
    for (std::int64_t task = next++; task < count; task = next++) keeping(fault, [&] { body(task); });
  });
#elif defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < count; ++task) keeping(fault, [&] { body(task); });
#else
  for (std::int64_t task = 0; task < count; ++task) body(task);
#endif
  qk_throw(fault);
}

}  // namespace
