// cpu/threads.h for ThreadSanitizer, which cannot see through libgomp: a team is POSIX threads, which it knows. Same
// work, same barriers; one of them can be left out, to show that this is reported.
#pragma once

#include <pthread.h>

#include <cstdint>

#include "skipped_barrier.h"

namespace recmas::cpu::RECMAS_ISA {

struct Team {
  int64_t rank, size;
  Barrier* barrier = nullptr;
  int* passed = nullptr;  // barriers that this thread has come to

  void wait() const {
    if (barrier != nullptr && (*passed)++ != tests::skipped_barrier) barrier->wait(size);
  }

  int64_t begin(int64_t items) const { return items * rank / size; }
  int64_t end(int64_t items) const { return items * (rank + 1) / size; }
};

template <class Body>
void run_team(int64_t threads, const Body& body) {
  constexpr int64_t kMost = 8;
  if (threads > kMost) threads = kMost;
  if (threads <= 1) return body(Team{0, 1});
  struct Worker {
    const Body* body;
    Team team;
    int passed;
    pthread_t thread;

    static void* run(void* worker) {
      const auto* const self = static_cast<Worker*>(worker);
      (*self->body)(self->team);
      return nullptr;
    }
  };
  Barrier barrier;
  Worker workers[kMost];
  for (int64_t rank = 0; rank < threads; ++rank) {
    Worker& worker = workers[rank];
    worker = {&body, {rank, threads, &barrier, &worker.passed}, 0, {}};
    if (pthread_create(&worker.thread, nullptr, &Worker::run, &worker) != 0) __builtin_abort();
  }
  for (int64_t rank = 0; rank < threads; ++rank) pthread_join(workers[rank].thread, nullptr);
}

}  // namespace recmas::cpu::RECMAS_ISA
