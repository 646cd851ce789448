// Cuts a caller's workspace into 64-byte aligned pieces; with a null base it only counts.
#pragma once

#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  char* take(int64_t bytes) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(bytes, 64);
    return piece;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace recmas::cpu::RECMAS_ISA
