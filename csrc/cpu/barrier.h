// Where the threads of a team wait for each other. The last one to come to libgomp's own barrier always asks the system
// to wake the others, even where none sleeps.
#pragma once

#include <sched.h>

#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

class Barrier {
 public:
  // Returns when `threads` threads are here; what each wrote before stands for all.
  void wait(int64_t threads) {
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_RELAXED);  // another one only begins when all are here
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(threads)) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        sched_yield();  // somebody else may need the core, such as the thread that is missing
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 microseconds on Zen 5: threads with equal work come within a few

  static void pause() {
#ifdef RECMAS_X86
    __builtin_ia32_pause();
#endif
  }

  alignas(64) uint32_t arrived_ = 0;  // two cache lines: who waits reads the second one alone
  alignas(64) uint32_t round_ = 0;
};

}  // namespace recmas::cpu::RECMAS_ISA
