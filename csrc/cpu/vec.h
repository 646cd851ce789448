// One vector of floats per instruction set. The kernels are written once, over this interface:
//
//     Vec, kWidth                      the register and its number of floats
//     set1 add sub mul div fma min max abs select_greater round_nearest scale_exp2
//     load(p) / load(p, count)         fp32, bf16 or fp16 -> fp32; lanes beyond count read as 0 and touch no memory
//     store(p, v) / store(p, v, count)  rounds to the type of p, to nearest even, NaN stays NaN
//     store_past_caches(p, v)          to a whole vector's address; before others read it, fence_stores()
//     low_halves, high_halves, join_pairs   the [k/2][column][2] bf16 layout: two bf16 in each 32-bit lane
//     dot_pairs                        acc + a_low * b_low + a_high * b_high (Isa::avx512_bf16 and amx)
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

// Stores past the caches are seen by whoever sees what this thread writes next.
inline void fence_stores() {
#if RECMAS_ISA_LEVEL >= 1
  _mm_sfence();
#endif
}

// How many lanes of a vector exist: loops run over whole vectors, then once over the part that is left.
struct Whole {
  static constexpr int64_t count = kWidth;
};
struct Part {
  int64_t count;
};
template <class Stored>
inline Vec load(const Stored* p, Whole) {
  return load(p);
}
template <class Stored>
inline Vec load(const Stored* p, Part part) {
  return load(p, part.count);
}
template <class Stored>
inline void store(Stored* p, Vec value, Whole) {
  store(p, value);
}
template <class Stored>
inline void store(Stored* p, Vec value, Part part) {
  store(p, value, part.count);
}

// Calls body(first column, Whole or Part) for each vector of `columns` columns.
template <class Body>
inline void each_vector(int64_t columns, const Body& body) {
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) body(column, Whole{});
  if (column < columns) body(column, Part{columns - column});
}

// Calls body(typed pointer): the branch on the storage type is taken once, outside the loops.
template <class Body>
inline void typed(const void* data, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(static_cast<const float*>(data));
    case Dtype::bf16:
      return body(static_cast<const Bf16*>(data));
    default:
      return body(static_cast<const F16*>(data));
  }
}
template <class Body>
inline void typed(void* data, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(static_cast<float*>(data));
    case Dtype::bf16:
      return body(static_cast<Bf16*>(data));
    default:
      return body(static_cast<F16*>(data));
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

// line[columns] = data[index ...], widened; and back, rounded.
inline void load_line(const void* data, Dtype dtype, int64_t index, int64_t columns, float* line) {
  typed(data, dtype, [&](const auto* p) {
    each_vector(columns, [&](int64_t c, auto lanes) { store(line + c, load(p + index + c, lanes), lanes); });
  });
}
inline void store_line(void* data, Dtype dtype, int64_t index, int64_t columns, const float* line) {
  typed(data, dtype, [&](auto* p) {
    each_vector(columns, [&](int64_t c, auto lanes) { store(p + index + c, load(line + c, lanes), lanes); });
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
