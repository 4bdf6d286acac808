// Work on torch's threads: as many as it has (each call says so), of the OpenMP that torch loaded.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace hvd_saef {

// Calls f(first, last, thread) for consecutive stretches of 0 to `size`, one a thread, each of at least
// `grain` unless there is only one. Teams have always all threads, since OpenMP ends those that a smaller
// one has no use for. What f throws is thrown here.
template <class F>
void parallel(int64_t threads, int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  if (threads <= 1 || size <= grain || omp_in_parallel()) return f(int64_t{0}, size, int64_t{0});
  std::exception_ptr thrown;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t team = std::min<int64_t>(omp_get_num_threads(), (size + grain - 1) / grain);
    const int64_t stretch = (size + team - 1) / team, thread = omp_get_thread_num(), first = thread * stretch;
    if (first < size) {
      try {
        f(first, std::min(size, first + stretch), thread);
      } catch (...) {  // one that left the team would end the process
#pragma omp critical
        thrown = std::current_exception();
      }
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace hvd_saef
