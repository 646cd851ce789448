// AVX2, FMA and F16C. See vec.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kWidth = 8;
constexpr int kPanelVecs = 2;  // 6 x 16 tile: 12 accumulators, 2 panel vectors, 1 broadcast of 16 registers
constexpr int kTileRows = 6;

struct Vec {
  __m256 v;
};

inline __m256i first(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count > kWidth ? kWidth : count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec set1(float value) { return {_mm256_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
inline Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_exp2(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t count) {
  return {count >= kWidth ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(count))};
}
// The first `count` of 8 16-bit values; AVX2 has no masked load of that width.
inline __m128i load_halves(const void* p, int64_t count) {
  if (count >= kWidth) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  alignas(16) uint16_t line[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) line[i] = static_cast<const uint16_t*>(p)[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(line));
}
inline void store_halves(void* p, __m128i bits, int64_t count) {
  if (count >= kWidth) return _mm_storeu_si128(static_cast<__m128i*>(p), bits);
  alignas(16) uint16_t line[kWidth];
  _mm_store_si128(reinterpret_cast<__m128i*>(line), bits);
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(p)[i] = line[i];
}
inline Vec widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const Bf16* p, int64_t count) { return widen_bf16(load_halves(p, count)); }
inline Vec load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const F16* p, int64_t count) { return {_mm256_cvtph_ps(load_halves(p, count))}; }

inline __m128i narrow_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline __m128i narrow_f16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_past_caches(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t count) {
  if (count >= kWidth) return _mm256_storeu_ps(p, a.v);
  _mm256_maskstore_ps(p, first(count), a.v);
}
inline void store(Bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
inline void store(Bf16* p, Vec a, int64_t count) { store_halves(p, narrow_bf16(a), count); }
inline void store(F16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }
inline void store(F16* p, Vec a, int64_t count) { store_halves(p, narrow_f16(a), count); }

inline Vec low_halves(Vec pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))}; }
inline Vec high_halves(Vec pairs) {
  return {_mm256_and_ps(pairs.v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Of two vectors that bf16 holds exactly.
inline Vec join_pairs(Vec low, Vec high) {
  const __m256i low_bits = _mm256_srli_epi32(_mm256_castps_si256(low.v), 16);
  return {_mm256_castsi256_ps(_mm256_or_si256(low_bits, _mm256_castps_si256(high.v)))};
}

inline float sum(Vec a) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

RECMAS_ALWAYS_INLINE void transpose(Vec (&r)[kWidth]) {
  __m256 s[kWidth];
  for (int i = 0; i < kWidth; i += 4) {  // 4 x 4 blocks
    const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    s[i] = _mm256_shuffle_ps(a, c, 0x44);
    s[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    s[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    s[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int j = 0; j < 4; ++j) {  // 128-bit lanes
    r[j].v = _mm256_permute2f128_ps(s[j], s[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(s[j], s[4 + j], 0x31);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
