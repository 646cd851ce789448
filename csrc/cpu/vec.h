// One vector of floats per instruction set. The kernels are written once, over this interface:
//
//     Vec, kWidth                      the register and its number of floats
//     set1 add sub mul div fma min max abs select_greater round_nearest scale_exp2
//     load(p) / load(p, count)         fp32, bf16 or fp16 -> fp32; lanes beyond count read as 0 and touch no memory
//     store(p, v) / store(p, v, count)  rounds to the type of p, to nearest even, NaN stays NaN
//     low_halves, high_halves, pack_pairs   the [k/2][column][2] bf16 layout: two bf16 in each 32-bit lane
//     dot_pairs                        acc + a_low * b_low + a_high * b_high (Isa::avx512_bf16 only)
//     transpose(rows)                  kWidth x kWidth in place
//     sum(v)                           lanes added in a fixed order
#pragma once

#include "types.h"

#if RECMAS_ISA_LEVEL >= 2
#include "vec_avx512.h"
#elif RECMAS_ISA_LEVEL == 1
#include "vec_avx2.h"
#else
#include "vec_baseline.h"
#endif

namespace recmas::cpu::RECMAS_ISA {

inline Vec load_any(const void* data, Dtype dtype, int64_t index, int64_t count) {
  switch (dtype) {
    case Dtype::f32:
      return load(static_cast<const float*>(data) + index, count);
    case Dtype::bf16:
      return load(static_cast<const Bf16*>(data) + index, count);
    default:
      return load(static_cast<const F16*>(data) + index, count);
  }
}

inline void store_any(void* data, Dtype dtype, int64_t index, Vec value, int64_t count) {
  switch (dtype) {
    case Dtype::f32:
      return store(static_cast<float*>(data) + index, value, count);
    case Dtype::bf16:
      return store(static_cast<Bf16*>(data) + index, value, count);
    default:
      return store(static_cast<F16*>(data) + index, value, count);
  }
}

inline Vec round_to(Vec value, Dtype dtype) {
  if (dtype == Dtype::f32) return value;
  uint16_t bits[kWidth];
  if (dtype == Dtype::bf16) {
    store(reinterpret_cast<Bf16*>(bits), value);
    return load(reinterpret_cast<const Bf16*>(bits));
  }
  store(reinterpret_cast<F16*>(bits), value);
  return load(reinterpret_cast<const F16*>(bits));
}

}  // namespace recmas::cpu::RECMAS_ISA
