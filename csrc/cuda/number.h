// Element types, and how an element of any Dtype is read and written: the same code on the device and on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../link.h"

#if defined(__CUDACC__)
#define RECMAS_ANYWHERE __host__ __device__ __forceinline__
#else
#define RECMAS_ANYWHERE inline
#endif
// Arrays indexed in such loops stay in registers.
#if defined(__CUDA_ARCH__)
#define RECMAS_UNROLL _Pragma("unroll")
#else
#define RECMAS_UNROLL
#endif

namespace recmas::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class To, class From>
RECMAS_ANYWHERE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

RECMAS_ANYWHERE float to_float(float value) { return value; }
RECMAS_ANYWHERE float to_float(Bf16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
RECMAS_ANYWHERE float to_float(F16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // Read with a wrong exponent, then scaled right: exact, and subnormals come out normal.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f));
#endif
}

template <class Element>
Element from_float(float value);
template <>
RECMAS_ANYWHERE float from_float<float>(float value) {
  return value;
}
template <>
RECMAS_ANYWHERE Bf16 from_float<Bf16>(float value) {
#ifdef __CUDA_ARCH__
  Bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
RECMAS_ANYWHERE F16 from_float<F16>(float value) {
#ifdef __CUDA_ARCH__
  F16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  const auto with_sign = [sign](uint32_t magnitude) { return F16{static_cast<uint16_t>(sign | magnitude)}; };
  if (rest > 0x7f800000u) return with_sign(0x7e00);
  if (rest >= 0x47800000u) return with_sign(0x7c00);  // 2^16 and above
  if (rest < 0x38800000u) {                           // below 2^-14: a multiple of 2^-24, rounded by the addition
    return with_sign(bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u);
  }
  return with_sign((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
#endif
}

RECMAS_ANYWHERE float load_number(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[index];
  if (dtype == Dtype::bf16) return to_float(static_cast<const Bf16*>(data)[index]);
  return to_float(static_cast<const F16*>(data)[index]);
}

RECMAS_ANYWHERE void store_number(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == Dtype::bf16) {
    static_cast<Bf16*>(data)[index] = from_float<Bf16>(value);
  } else {
    static_cast<F16*>(data)[index] = from_float<F16>(value);
  }
}

RECMAS_ANYWHERE float round_to(Dtype dtype, float value) {
  if (dtype == Dtype::f32) return value;
  return dtype == Dtype::bf16 ? to_float(from_float<Bf16>(value)) : to_float(from_float<F16>(value));
}

// As torch: gelu(-inf) is NaN in both forms.
RECMAS_ANYWHERE float gelu(float x, Gelu kind) {
  if (kind == Gelu::erf) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <class Element>
RECMAS_ANYWHERE constexpr Dtype dtype_of() {
  return sizeof(Element) == 4 ? Dtype::f32 : std::is_same_v<Element, Bf16> ? Dtype::bf16 : Dtype::f16;
}

// act(element) with a value of the type that a dtype names.
template <class Act>
auto with_element(Dtype dtype, Act act) {
  switch (dtype) {
    case Dtype::f32:
      return act(float{});
    case Dtype::bf16:
      return act(Bf16{});
    default:
      return act(F16{});
  }
}

}  // namespace recmas::cuda
