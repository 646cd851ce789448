// Threads are torch's OpenMP team. Work is cut into items; each thread takes one contiguous run of them, and no item's
// arithmetic depends on how many threads there are.
#pragma once

#include "barrier.h"

#ifdef RECMAS_POSIX_THREADS
#include "../tests/posix_threads.h"
#else

#ifdef _OPENMP
#include <omp.h>
#endif

namespace recmas::cpu::RECMAS_ISA {

struct Team {
  int64_t rank, size;
  Barrier* barrier = nullptr;  // null: OpenMP's

  void wait() const {
    if (barrier != nullptr) {
      barrier->wait(size);
    } else if (size > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
  }

  int64_t begin(int64_t items) const { return items * rank / size; }
  int64_t end(int64_t items) const { return items * (rank + 1) / size; }
};

#ifdef _OPENMP
inline int64_t cores() {
  static const int64_t count = omp_get_num_procs();
  return count;
}
#endif

// Runs body(team) on `threads` threads, or as many as OpenMP gives. Where they are more than there are cores, a thread
// that spins keeps a missing one from its core: OpenMP's barrier lets it sleep.
template <class Body>
void run_team(int64_t threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier barrier;
#pragma omp parallel num_threads(static_cast<int>(threads))
    body(Team{omp_get_thread_num(), omp_get_num_threads(), threads > cores() ? nullptr : &barrier});
    return;
  }
#else
  (void)threads;
#endif
  body(Team{0, 1});
}

}  // namespace recmas::cpu::RECMAS_ISA

#endif

namespace recmas::cpu::RECMAS_ISA {

// Below about 4 microseconds of arithmetic a second thread costs more than it gains.
inline int64_t useful_threads(int64_t threads, double flops) {
  const double most = flops / 400000.0;
  return most < static_cast<double>(threads) ? larger(static_cast<int64_t>(most), 1) : threads;
}

}  // namespace recmas::cpu::RECMAS_ISA
