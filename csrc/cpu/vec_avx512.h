// AVX-512 F, BW, VL, DQ (Isa::avx512), and AVX512-BF16 on top of it (Isa::avx512_bf16, amx). See vec.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kWidth = 16;
constexpr int kPanelVecs = 3;  // 8 x 48 tile: 24 accumulators, 3 panel vectors, 1 broadcast of 32 registers
constexpr int kTileRows = 8;

struct Vec {
  __m512 v;
};

inline __mmask16 first(int64_t count) {
  return count >= kWidth ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
}

inline Vec set1(float value) { return {_mm512_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// Lanes where a > b take yes, the others (NaN too) no.
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
inline Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n in [-126, 127].
inline Vec scale_exp2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline Vec widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const Bf16* p, int64_t count) { return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p)); }
inline Vec load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const F16* p, int64_t count) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))}; }

inline __m256i narrow_bf16(Vec a) {
#if RECMAS_ISA_LEVEL >= 3
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}
inline __m256i narrow_f16(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_past_caches(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t count) { _mm512_mask_storeu_ps(p, first(count), a.v); }
inline void store(Bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void store(Bf16* p, Vec a, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(a)); }
inline void store(F16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }
inline void store(F16* p, Vec a, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), narrow_f16(a)); }

inline Vec low_halves(Vec pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))}; }
inline Vec high_halves(Vec pairs) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(pairs.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Of two vectors that bf16 holds exactly.
inline Vec join_pairs(Vec low, Vec high) {
  const __m512i low_bits = _mm512_srli_epi32(_mm512_castps_si512(low.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(low_bits, _mm512_castps_si512(high.v)))};
}

#if RECMAS_ISA_LEVEL >= 3
inline Vec dot_pairs(Vec acc, Vec a, Vec b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

inline float sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// out[r * stride + c] += sum(v[r][c]): the additions of sum(), for sixteen vectors side by side.
RECMAS_ALWAYS_INLINE void add_sums(const Vec (&v)[4][4], float* out, int64_t stride) {
  __m512 quarters[4];  // of a column: four numbers of each row
  for (int c = 0; c < 4; ++c) {
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 a = halves(v[0][c].v, v[1][c].v), b = halves(v[2][c].v, v[3][c].v);
    quarters[c] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  const auto twos = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 a = twos(quarters[0], quarters[1]), b = twos(quarters[2], quarters[3]);
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  const __m128 rows[4] = {_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1),
                          _mm512_extractf32x4_ps(sums, 2), _mm512_extractf32x4_ps(sums, 3)};
  for (int r = 0; r < 4; ++r) _mm_storeu_ps(out + r * stride, _mm_add_ps(_mm_loadu_ps(out + r * stride), rows[r]));
}

RECMAS_ALWAYS_INLINE void transpose(Vec (&r)[kWidth]) {
  __m512 t[kWidth];
  for (int i = 0; i < kWidth; i += 2) {  // 2 x 2 blocks
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 s[kWidth];
  for (int i = 0; i < kWidth; i += 4) {  // 4 x 4 blocks
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      s[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      s[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {  // 128-bit lanes
    const __m512 a = _mm512_shuffle_f32x4(s[j], s[4 + j], 0x88), b = _mm512_shuffle_f32x4(s[j], s[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
