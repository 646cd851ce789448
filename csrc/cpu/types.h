// Storage types of 16 bits, and which namespace this translation unit's kernels live in.
//
// kernels.cpp is compiled once per instruction set with RECMAS_ISA (a namespace name) and RECMAS_ISA_LEVEL (the
// number in link.h's Isa). Everything, inline functions too, stays inside that namespace and uses no std templates:
// otherwise the linker could keep an AVX-512 copy of a shared inline function and crash an older processor.
#pragma once

#include <cstdint>

#include "../link.h"

#ifndef RECMAS_ISA
#error "compile with -DRECMAS_ISA=<namespace> -DRECMAS_ISA_LEVEL=<0..4>"
#endif

// For functions whose arrays of vectors must stay in registers: called, they pass through memory.
#define RECMAS_INLINED __attribute__((always_inline))  // of a lambda
#define RECMAS_ALWAYS_INLINE inline RECMAS_INLINED

namespace recmas::cpu::RECMAS_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr bool kMatrixTiles = RECMAS_ISA_LEVEL >= 4;  // AMX

// A number that a lambda gets as a constant.
template <int number>
struct Constant {
  static constexpr int value = number;
  constexpr operator int() const { return number; }
};

// Calls body(i) for i from `first` to count - 1, as constants. Sums in an array that the outer of two loops indexes
// leave the registers: compilers unroll it after they have given arrays their place.
template <int count, int first = 0, class Body>
RECMAS_ALWAYS_INLINE void unrolled(const Body& body) {
  if constexpr (first < count) {
    body(Constant<first>{});
    unrolled<count, first + 1>(body);
  }
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace recmas::cpu::RECMAS_ISA
