// Numbers of fp32 as sums of three in bf16, for AMX: it multiplies bf16 alone. A number of fp32 has 24 bits, one of
// bf16 8: cut off from the top, three hold it exactly, and their products with a number of bf16 are exact in fp32. So
// rows in fp32 times a weight that bf16 holds are three products of bf16 (docs/frozen.md, Float32 rows with AMX). AMX
// takes denormal numbers for zero: parts, weights, products and sums below 2^-126 are lost.
#pragma once

#include "vec.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kParts = 3;

// Where the parts of one row lie.
struct SplitRow {
  Bf16* first;
  int64_t part_stride;  // elements

  SplitRow operator+(int64_t column) const { return {first + column, part_stride}; }
};

#if RECMAS_ISA_LEVEL >= 4
// What is infinite or no number is in the first part alone.
template <class Lanes>
inline void store(SplitRow to, Vec value, Lanes lanes) {
  const __mmask16 finite = _mm512_cmp_ps_mask(abs(value).v, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  const __m512 upper_bits = _mm512_castsi512_ps(_mm512_set1_epi32(~0xffff));
  Vec rest = value;
  for (int part = 0; part < kParts - 1; ++part) {
    const __m512 cut = _mm512_and_ps(rest.v, upper_bits);
    store(to.first + part * to.part_stride, Vec{_mm512_mask_mov_ps(rest.v, finite, cut)}, lanes);
    rest.v = _mm512_maskz_sub_ps(finite, rest.v, cut);
  }
  store(to.first + (kParts - 1) * to.part_stride, rest, lanes);
}
#endif

}  // namespace recmas::cpu::RECMAS_ISA
