// Threads. The only place that knows OpenMP, so that another pool can take its place.
#pragma once

#include "ops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

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
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(shares))
  {
    const std::int64_t all = omp_get_num_threads(), me = omp_get_thread_num();
    const std::int64_t begin = count * me / all, end = count * (me + 1) / all;
    if (begin < end) body(begin, end);
  }
#else
  body(std::int64_t{0}, count);
#endif
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
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t task = 0; task < count; ++task) body(task);
#else
  for (std::int64_t task = 0; task < count; ++task) body(task);
#endif
}

}  // namespace
