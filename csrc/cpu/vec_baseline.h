// Four floats in the compiler's own vector type: SSE2 on x86-64, NEON on arm64, plain code elsewhere. See vec.h.
#pragma once

#include <cstring>

#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kWidth = 4;
constexpr int kPanelVecs = 2;  // 4 x 8 tile: 8 accumulators, 2 panel vectors, 1 broadcast of 16 registers
constexpr int kTileRows = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

struct Vec {
  Floats v;
};

inline Bits bits_of(Vec a) { return reinterpret_cast<Bits>(a.v); }
inline Vec of_bits(Bits bits) { return {reinterpret_cast<Floats>(bits)}; }
inline Vec choose(Mask mask, Vec yes, Vec no) {
  const Bits chosen = reinterpret_cast<Bits>(mask);
  return of_bits((bits_of(yes) & chosen) | (bits_of(no) & ~chosen));
}

inline Vec set1(float value) { return {Floats{value, value, value, value}}; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec min(Vec a, Vec b) { return choose(a.v < b.v, a, b); }
inline Vec max(Vec a, Vec b) { return choose(a.v > b.v, a, b); }
inline Vec abs(Vec a) { return of_bits(bits_of(a) & Bits{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff}); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return choose(a.v > b.v, yes, no); }
// For |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits, so the sum is rounded to a whole number.
inline Vec round_nearest(Vec a) {
  const Floats magic = set1(12582912.0f).v;
  return {(a.v + magic) - magic};
}
inline Vec scale_exp2(Vec a, Vec n) {
  Vec power;
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float value;
    std::memcpy(&value, &exponent, sizeof value);
    power.v[i] = value;
  }
  return mul(a, power);
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t narrow_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits | 0x400000u) >> 16);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// fp16 and fp32 exponents differ by 112. Subnormal values count units of 2^-24; no fp32 subnormal takes part, which a
// processor may be set to take for zero.
inline float widen_f16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float units = static_cast<float>(static_cast<int32_t>(half & 0x3ffu)) * 0x1p-24f;
  const uint32_t finite = magnitude < 0x00800000u ? float_bits(units) : magnitude + 0x38000000u;
  return bits_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}
inline uint16_t narrow_f16(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and beyond
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 2^-1 aligns the last kept bit with 2^-24
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline Vec load(const float* p, int64_t count) {
  Vec a = set1(0.0f);
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) a.v[i] = p[i];
  }
  return a;
}
inline Vec load(const Bf16* p, int64_t count) {
  Bits bits = {0, 0, 0, 0};
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
  }
  return of_bits(bits);
}
inline Vec load(const Bf16* p) { return load(p, kWidth); }
inline Vec load(const F16* p, int64_t count) {
  Vec a = set1(0.0f);
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) a.v[i] = widen_f16(p[i].bits);
  }
  return a;
}
inline Vec load(const F16* p) { return load(p, kWidth); }

inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
inline void store_past_caches(float* p, Vec a) { store(p, a); }
inline void store(float* p, Vec a, int64_t count) {
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) p[i] = a.v[i];
  }
}
inline void store(Bf16* p, Vec a, int64_t count) {
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) p[i].bits = narrow_bf16(a.v[i]);
  }
}
inline void store(Bf16* p, Vec a) { store(p, a, kWidth); }
inline void store(F16* p, Vec a, int64_t count) {
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) p[i].bits = narrow_f16(a.v[i]);
  }
}
inline void store(F16* p, Vec a) { store(p, a, kWidth); }

inline Vec low_halves(Vec pairs) { return of_bits(bits_of(pairs) << 16); }
inline Vec high_halves(Vec pairs) {
  return of_bits(bits_of(pairs) & Bits{0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u});
}
// Of two vectors that bf16 holds exactly.
inline Vec join_pairs(Vec low, Vec high) { return of_bits((bits_of(low) >> 16) | bits_of(high)); }

inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

RECMAS_ALWAYS_INLINE void transpose(Vec (&r)[kWidth]) {
  Vec t[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) t[i].v[j] = r[j].v[i];
  }
  for (int i = 0; i < kWidth; ++i) r[i] = t[i];
}

}  // namespace recmas::cpu::RECMAS_ISA
