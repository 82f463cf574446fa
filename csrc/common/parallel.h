// parallel.h - shares independent units of work among the threads of the OpenMP pool, which is torch's own: the
// extension asks for libgomp.so.1 and finds the copy that torch has loaded, so torch.set_num_threads rules here too.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyflowmap {

// Calls work(first, last) on disjoint runs that cover [0, units), with at most `wanted` threads. Which thread does
// what never changes a result: a unit depends on nothing but its own index.
template <class Work> void share(int64_t units, int64_t wanted, const Work& work) {
#if defined(_OPENMP)
  int64_t threads = wanted < units ? wanted : units;
  if (threads > 1) {
    const int64_t most = omp_get_max_threads();
    threads = threads < most ? threads : most;
  }
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t count = omp_get_num_threads(), index = omp_get_thread_num();
      const int64_t first = units * index / count, last = units * (index + 1) / count;
      if (first < last) work(first, last);
    }
    return;
  }
#else
  (void)wanted;
#endif
  if (units > 0) work(0, units);
}

}  // namespace pyflowmap
