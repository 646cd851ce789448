// Few left-hand rows times an unpacked weight: each weight row is read once, as it lies in memory, and multiplied with
// every left-hand row. Nothing is packed, so the cost is that of reading the weight.
#pragma once

#include "amx.h"
#include "pack.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kStreamRows = RECMAS_ISA_LEVEL >= 2 ? 4 : 2;  // left-hand rows at a time
constexpr int kStreamColumns = 4;                           // weight rows at a time

template <class Stored, bool bf16_left, int rows, int columns>
inline void stream_step(Accumulators<rows, columns>& acc, const void* left, int64_t left_stride, const Stored* right,
                        int64_t right_stride, int64_t k, int64_t count) {
#if RECMAS_ISA_LEVEL >= 3
  if constexpr (bf16_left) {
    Vec w[columns];
    for (int c = 0; c < columns; ++c) {
      const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1u;
      w[c].v = reinterpret_cast<__m512>(_mm512_maskz_loadu_epi16(mask, right + c * right_stride + k));
    }
    for (int r = 0; r < rows; ++r) {  // left-hand rows are padded to whole vectors
      const Vec a = load(reinterpret_cast<const float*>(static_cast<const Bf16*>(left) + r * left_stride + k));
      for (int c = 0; c < columns; ++c) acc.at[r][c] = dot_pairs(acc.at[r][c], a, w[c]);
    }
    return;
  }
#endif
  Vec w[columns];
  for (int c = 0; c < columns; ++c) w[c] = load(right + c * right_stride + k, count);
  for (int r = 0; r < rows; ++r) {
    const Vec a = load(static_cast<const float*>(left) + r * left_stride + k);
    for (int c = 0; c < columns; ++c) acc.at[r][c] = fma(a, w[c], acc.at[r][c]);
  }
}

// With more bytes a weight is in no cache. Then one row of it after the other is read faster than some side by side,
// which are as fast for more left-hand rows, and faster from a cache.
constexpr int64_t kBeyondCaches = 32 << 20;
constexpr int64_t kStreamAhead = 4608;  // bytes that are asked for ahead where rows are read one after the other

// out[r][c] += sum_k left[r][k] * right[c][k], out [rows][kPanel].
template <class Stored, bool bf16_left, int rows, int columns>
void stream_block(const void* left, int64_t left_stride, const Stored* right, int64_t right_stride, int64_t k,
                  float* out) {
  constexpr int64_t lanes = bf16_left ? 2 * kWidth : kWidth;
  Accumulators<rows, columns> acc;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) acc.at[r][c] = set1(0.0f);
  }
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(Stored));
  static_assert(line % lanes == 0, "whole steps for each cache line");
  int64_t i = 0;
  for (; i + line <= k; i += line) {
    for (int c = 0; c < columns; ++c) {  // what follows in memory: once for a line
      if constexpr (columns == 1) {
        __builtin_prefetch(reinterpret_cast<const char*>(right + i) + kStreamAhead);
      } else {
        __builtin_prefetch(right + (columns + c) * right_stride + i);
      }
    }
    for (int64_t j = i; j < i + line; j += lanes) {
      stream_step<Stored, bf16_left, rows, columns>(acc, left, left_stride, right, right_stride, j, lanes);
    }
  }
  for (; i + lanes <= k; i += lanes) {
    stream_step<Stored, bf16_left, rows, columns>(acc, left, left_stride, right, right_stride, i, lanes);
  }
  if (i < k) stream_step<Stored, bf16_left, rows, columns>(acc, left, left_stride, right, right_stride, i, k - i);
#if RECMAS_ISA_LEVEL >= 2
  if constexpr (rows == 4 && columns == 4) return add_sums(acc.at, out, kPanel);
#endif
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) out[r * kPanel + c] += sum(acc.at[r][c]);
  }
}

template <class Stored, bool bf16_left, int columns>
void stream_columns(const void* left, int64_t left_stride, int64_t rows, const Stored* right, int64_t right_stride,
                    int64_t k, float* out) {
  for (int64_t r = 0; r < rows; r += kStreamRows) {
    const void* at = static_cast<const char*>(left) + r * left_stride * (bf16_left ? 2 : 4);
    float* to = out + r * kPanel;
    switch (smaller(rows - r, kStreamRows)) {
      case 1:
        stream_block<Stored, bf16_left, 1, columns>(at, left_stride, right, right_stride, k, to);
        break;
      case 2:
        stream_block<Stored, bf16_left, 2, columns>(at, left_stride, right, right_stride, k, to);
        break;
#if RECMAS_ISA_LEVEL >= 2
      case 3:
        stream_block<Stored, bf16_left, 3, columns>(at, left_stride, right, right_stride, k, to);
        break;
      default:
        stream_block<Stored, bf16_left, 4, columns>(at, left_stride, right, right_stride, k, to);
        break;
#endif
    }
  }
}

template <class Stored, bool bf16_left>
void stream_stored(const void* left, int64_t left_stride, int64_t rows, const Stored* right, int64_t right_stride,
                   int64_t columns, int64_t k, bool side_by_side, float* out) {
  int64_t c = 0;
  for (; side_by_side && c + kStreamColumns <= columns; c += kStreamColumns) {
    stream_columns<Stored, bf16_left, kStreamColumns>(left, left_stride, rows, right + c * right_stride, right_stride,
                                                      k, out + c);
  }
  for (; c < columns; ++c) {
    stream_columns<Stored, bf16_left, 1>(left, left_stride, rows, right + c * right_stride, right_stride, k, out + c);
  }
}

// More left-hand rows than this pay for packing the weight.
constexpr int64_t kStreamLimit = 16;

// Whether a product reads `right` in place instead of packing it.
inline bool streams(const Right& right, const Left& left, int64_t rows) {
  if (right.form != Form::stored || right.layout != Layout::columns || rows > kStreamLimit) return false;
  if (in_registers(left, rows)) return false;
  if (left.bf16) return right.dtype == Dtype::bf16;
  return right.dtype == right.compute || right.dtype != Dtype::f32;
}

// out [rows][kPanel] += left x columns [first_column, first_column + columns) of right.
inline void stream_tile(const void* left, int64_t left_stride, bool bf16_left, int64_t rows, const Right& right,
                        int64_t first_column, int64_t columns, float* out) {
  const int64_t offset = first_column * right.stride;
  const bool side_by_side =
      RECMAS_ISA_LEVEL < 2 || rows > 1 || right.columns * right.k * dtype_bytes(right.dtype) <= kBeyondCaches;
  switch (right.dtype) {
    case Dtype::f32:
      return stream_stored<float, false>(left, left_stride, rows, static_cast<const float*>(right.data) + offset,
                                         right.stride, columns, right.k, side_by_side, out);
    case Dtype::bf16: {
      const Bf16* data = static_cast<const Bf16*>(right.data) + offset;
      if constexpr (kDotPairs) {
        if (bf16_left) {
          return stream_stored<Bf16, true>(left, left_stride, rows, data, right.stride, columns, right.k, side_by_side,
                                           out);
        }
      }
      return stream_stored<Bf16, false>(left, left_stride, rows, data, right.stride, columns, right.k, side_by_side,
                                        out);
    }
    default:
      return stream_stored<F16, false>(left, left_stride, rows, static_cast<const F16*>(right.data) + offset,
                                       right.stride, columns, right.k, side_by_side, out);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
