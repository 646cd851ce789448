// GELU and its derivative on vectors. Absolute error of gelu at most 4 * 2^-24 * max(1, |x|).
//
//     erf:   gelu(x) = x Phi(x),            Phi(-u) = exp(-u^2/2) q(u), q a polynomial (tools/derive_gelu.py)
//     tanh:  gelu(x) = x / (1 + exp(-2s)),  s = sqrt(2/pi) (x + 0.044715 x^3)
//
// As in torch, -inf gives NaN (inf * 0) and NaN stays NaN.
#pragma once

#include "vec.h"

namespace recmas::cpu::RECMAS_ISA {

// 2^t for t in [-126, 126]; relative error of the polynomial 1.9e-9.
inline Vec exp2(Vec t) {
  const Vec n = round_nearest(t), f = sub(t, n);
  Vec p = set1(0.000153458122f);
  p = fma(p, f, set1(0.00133999312f));
  p = fma(p, f, set1(0.00961848896f));
  p = fma(p, f, set1(0.0555032878f));
  p = fma(p, f, set1(0.240226469f));
  p = fma(p, f, set1(0.693147206f));
  p = fma(p, f, set1(1.0f));
  return scale_exp2(p, n);
}

struct GeluParts {
  Vec probability;  // gelu(x) = x * probability
  Vec slope;        // x * d probability / dx
};

// exp(-x^2/2) and Phi(x). Beyond |x| = 6 the tail is taken as 0 (Phi(-6) = 1e-9).
inline Vec normal_cdf(Vec x, Vec* density) {
  const Vec u = min(abs(x), set1(6.0f));
  const Vec e = exp2(mul(mul(u, u), set1(-0.72134752f)));  // -log2(e) / 2
  Vec q = set1(1.6316879e-06f);
  q = fma(q, u, set1(-3.5207749e-05f));
  q = fma(q, u, set1(0.000339738194f));
  q = fma(q, u, set1(-0.00197462637f));
  q = fma(q, u, set1(0.00793938816f));
  q = fma(q, u, set1(-0.0243139263f));
  q = fma(q, u, set1(0.0611548828f));
  q = fma(q, u, set1(-0.132513796f));
  q = fma(q, u, set1(0.249916793f));
  q = fma(q, u, set1(-0.398936515f));
  q = fma(q, u, set1(0.499999934f));
  const Vec zero = set1(0.0f), beyond = abs(x);
  const Vec tail = select_greater(beyond, set1(6.0f), zero, mul(e, q));
  *density = select_greater(beyond, set1(6.0f), zero, mul(e, set1(0.398942280f)));  // 1 / sqrt(2 pi)
  return select_greater(x, zero, sub(set1(1.0f), tail), tail);
}

inline GeluParts gelu_parts_erf(Vec x) {
  Vec density;
  const Vec probability = normal_cdf(x, &density);
  return {probability, mul(x, density)};
}

inline GeluParts gelu_parts_tanh(Vec x) {
  const Vec one = set1(1.0f), square = mul(x, x);
  // -2 sqrt(2/pi) log2(e) (x + 0.044715 x^3), with both constants multiplied out
  const Vec t = mul(x, fma(square, set1(-0.10294324f), set1(-2.3022082f)));
  // Beyond +-126 the logistic is 0 or 1 to the last bit.
  const Vec bounded = max(min(t, set1(126.0f)), set1(-126.0f));
  const Vec e = select_greater(set1(-125.0f), t, set1(0.0f), exp2(bounded)), logistic = div(one, add(one, e));
  const Vec probability = select_greater(t, set1(125.0f), set1(0.0f), logistic);
  // The logistic's slope is p (1 - p) = e p^2; the first form would cancel where p is near 1.
  // Its factor is 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2), kept finite where e is long 0.
  const Vec rate = mul(fma(min(square, set1(1e6f)), set1(0.134145f), one), set1(1.59576912f));
  return {probability, mul(mul(x, rate), mul(mul(e, probability), probability))};
}

inline Vec gelu(Vec x, Gelu kind) {
  if (kind == Gelu::tanh) return mul(x, gelu_parts_tanh(x).probability);
  Vec density;
  return mul(x, normal_cdf(x, &density));
}

// Returns gelu'(x) and puts gelu(x) in *value.
inline Vec gelu_gradient(Vec x, Gelu kind, Vec* value) {
  const GeluParts parts = kind == Gelu::tanh ? gelu_parts_tanh(x) : gelu_parts_erf(x);
  *value = mul(x, parts.probability);
  return add(parts.probability, parts.slope);
}

}  // namespace recmas::cpu::RECMAS_ISA
