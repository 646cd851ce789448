// The inner loops: a tile of kTileRows x kPanel outputs kept in registers while one panel of weights streams past.
//
// A panel holds kPanel columns of the right-hand matrix for all k, k-major, so that it is read once, in order.
//     Format::f32    [k][kPanel] fp32
//     Format::f16    [k][kPanel] fp16, widened on the way into registers
//     Format::pairs  [k/2][kPanel][2] bf16, two consecutive k side by side; odd k is padded with zero
// The left-hand rows are fp32, or bf16 (pairs as they lie in memory) where the processor multiplies bf16 itself.
#pragma once

#include "vec.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int kPanel = kPanelVecs * kWidth;
constexpr bool kDotPairs = RECMAS_ISA_LEVEL >= 3;

enum class Format { f32, f16, pairs };

constexpr Format packed_format(Dtype compute) {
  return compute == Dtype::f32 ? Format::f32 : compute == Dtype::f16 ? Format::f16 : Format::pairs;
}
// Steps of the k loop, and bytes of one step of a panel.
constexpr int64_t panel_steps(Format format, int64_t k) { return format == Format::pairs ? (k + 1) / 2 : k; }
constexpr int64_t step_bytes(Format format) { return kPanel * (format == Format::f16 ? 2 : 4); }
constexpr int64_t panel_bytes(Format format, int64_t k) {
  return round_up(panel_steps(format, k) * step_bytes(format), 64);
}

template <int rows, int vecs>
struct Accumulators {
  Vec at[rows][vecs];
};

// acc += left[r][k] * panel[k][c] for the one or two k of a step; with two fp32 products the second goes to `odd`.
template <Format format, bool bf16_left, int rows, int vecs>
inline void multiply_step(Accumulators<rows, vecs>& acc, Accumulators<rows, vecs>& odd, const void* left,
                          int64_t left_stride, const char* panel, int64_t step) {
  if constexpr (format == Format::pairs && bf16_left) {
#if RECMAS_ISA_LEVEL >= 3
    Vec w[vecs];
    for (int c = 0; c < vecs; ++c) w[c] = load(reinterpret_cast<const float*>(panel) + c * kWidth);
    for (int r = 0; r < rows; ++r) {
      float pair;
      __builtin_memcpy(&pair, static_cast<const Bf16*>(left) + r * left_stride + 2 * step, sizeof pair);
      const Vec a = set1(pair);
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = dot_pairs(acc.at[r][c], a, w[c]);
    }
#endif
  } else if constexpr (format == Format::pairs) {
    // One k after the other: with both halves of the pairs widened at once, 6 x 16 sums left AVX2 two registers short
    // (docs/kernels.md, Pairs without native products).
    const float* a = static_cast<const float*>(left) + 2 * step;
    Vec w[vecs];
    for (int c = 0; c < vecs; ++c) w[c] = low_halves(load(reinterpret_cast<const float*>(panel) + c * kWidth));
    for (int r = 0; r < rows; ++r) {
      const Vec value = set1(a[r * left_stride]);
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = fma(value, w[c], acc.at[r][c]);
    }
    for (int c = 0; c < vecs; ++c) w[c] = high_halves(load(reinterpret_cast<const float*>(panel) + c * kWidth));
    for (int r = 0; r < rows; ++r) {
      const Vec value = set1(a[r * left_stride + 1]);
      for (int c = 0; c < vecs; ++c) odd.at[r][c] = fma(value, w[c], odd.at[r][c]);
    }
  } else {
    Vec w[vecs];
    for (int c = 0; c < vecs; ++c) {
      if constexpr (format == Format::f16) {
        w[c] = load(reinterpret_cast<const F16*>(panel) + c * kWidth);
      } else {
        w[c] = load(reinterpret_cast<const float*>(panel) + c * kWidth);
      }
    }
    const float* a = static_cast<const float*>(left) + step;
    for (int r = 0; r < rows; ++r) {
      const Vec value = set1(a[r * left_stride]);
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = fma(value, w[c], acc.at[r][c]);
    }
  }
}

// A running sum over k is closed after this many k: its rounding error grows with the length of the chain. The same
// number for fp32 panels and the pairs they become: both must give the same bits.
constexpr int64_t kChain = 128;
// Sums of products of two bf16: what a chain loses is thousands of times less than what rounding to bf16 does.
constexpr int64_t kDotChain = 2048;
// How far ahead a panel read by one group of rows alone is prefetched, in bytes: into the first-level cache, or further
// ahead into the second where so few sums leave time for what lies between (docs/kernels.md, Far prefetch).
constexpr int64_t kPrefetch = 4608, kFarPrefetch = 16384;

// Memory that will be wanted soon, prefetched while a tile is computed: one cache line per step, as far as steps go.
struct Ahead {
  const char* at;  // null: the tile's own panel
  int64_t rows;
  int64_t row_lines;  // cache lines of a row
  int64_t stride;     // bytes from row to row
};

struct TileCall {
  const void* left;
  int64_t left_stride;
  const char* panel;
  int64_t steps;
  float* out;  // [rows][kPanel]
  bool fresh;  // out holds nothing yet: it is written, not added to
  Ahead ahead;
};

// out [rows][kPanel] += (fresh: =) left [rows][k] x panel [k][vecs * kWidth]. in_order: every sum goes through k one by
// one, so that its bits do not depend on how many rows and columns the tile has.
template <Format format, bool bf16_left, int rows, int vecs, bool in_order = false>
void multiply_tile(const TileCall& call) {
  constexpr int64_t chain_steps = format != Format::pairs ? kChain : (bf16_left ? kDotChain : kChain) / 2;
  // Few accumulators would wait for each other's additions: even and odd k get their own. Both halves of a pair of
  // fp32 products are k even and k odd, so that packed pairs and fp32 panels still give the same bits.
  constexpr bool few = rows * vecs <= 6 && !in_order;
  constexpr int sets = few ? 2 : 1;
  constexpr bool both_k = format == Format::pairs && !bf16_left;
  const char* at = call.panel;
  const char* ahead = call.ahead.at;
  int64_t ahead_lines = ahead == nullptr ? 0 : call.ahead.rows * call.ahead.row_lines, ahead_line = 0;
  for (int64_t first = 0; first < call.steps; first += chain_steps) {
    Accumulators<rows, vecs> acc[sets];
    for (int set = 0; set < sets; ++set) {
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < vecs; ++c) acc[set].at[r][c] = set1(0.0f);
      }
    }
    const int64_t last = smaller(first + chain_steps, call.steps);
    const auto advance = [&](int64_t step, Accumulators<rows, vecs>& even, Accumulators<rows, vecs>& odd) {
      if (ahead == nullptr) {
        for (int64_t line = 0; line < step_bytes(format); line += 64) {
          if constexpr (few) {
            __builtin_prefetch(at + kFarPrefetch + line, 0, 2);
          } else {
            __builtin_prefetch(at + kPrefetch + line);
          }
        }
      } else if (ahead_lines > 0) {
        --ahead_lines;
        __builtin_prefetch(ahead + 64 * ahead_line, 0, 2);
        if (++ahead_line == call.ahead.row_lines) {
          ahead_line = 0;
          ahead += call.ahead.stride;
        }
      }
      multiply_step<format, bf16_left, rows, vecs>(even, odd, call.left, call.left_stride, at, step);
      at += step_bytes(format);
    };
    int64_t step = first;
    if constexpr (sets == 2 && !both_k) {
      for (; step + 1 < last; step += 2) {
        advance(step, acc[0], acc[0]);
        advance(step + 1, acc[1], acc[1]);
      }
    }
    for (; step < last; ++step) advance(step, acc[0], acc[sets - 1]);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < vecs; ++c) {
        Vec total = acc[0].at[r][c];
        if constexpr (sets == 2) total = add(total, acc[1].at[r][c]);
        float* sum = call.out + r * kPanel + c * kWidth;
        store(sum, call.fresh && first == 0 ? total : add(load(sum), total));
      }
    }
  }
}

using TileFunction = void (*)(const TileCall& call);

template <Format format, bool bf16_left, int vecs, bool in_order>
TileFunction tile_of_rows(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<format, bf16_left, 1, vecs, in_order>;
    case 2:
      return multiply_tile<format, bf16_left, 2, vecs, in_order>;
    case 3:
      return multiply_tile<format, bf16_left, 3, vecs, in_order>;
    case 4:
      return multiply_tile<format, bf16_left, 4, vecs, in_order>;
#if RECMAS_ISA_LEVEL >= 1
    case 5:
      return multiply_tile<format, bf16_left, 5, vecs, in_order>;
    case 6:
      return multiply_tile<format, bf16_left, 6, vecs, in_order>;
#endif
#if RECMAS_ISA_LEVEL >= 2
    case 7:
      return multiply_tile<format, bf16_left, 7, vecs, in_order>;
    case 8:
      return multiply_tile<format, bf16_left, 8, vecs, in_order>;
#endif
    default:
      return nullptr;
  }
}

template <Format format, bool bf16_left, bool in_order = false>
TileFunction tile_of(int64_t rows, int64_t columns) {
  if (columns <= kWidth) return tile_of_rows<format, bf16_left, 1, in_order>(rows);
#if RECMAS_ISA_LEVEL >= 2
  if (columns > 2 * kWidth) return tile_of_rows<format, bf16_left, 3, in_order>(rows);
#endif
  return tile_of_rows<format, bf16_left, 2, in_order>(rows);
}

// The kernel for `rows` <= kTileRows left-hand rows and `columns` <= kPanel columns.
inline TileFunction choose_tile(Format format, bool bf16_left, int64_t rows, int64_t columns) {
  if (format == Format::f32) return tile_of<Format::f32, false>(rows, columns);
  if (format == Format::f16) return tile_of<Format::f16, false>(rows, columns);
  if constexpr (kDotPairs) {
    if (bf16_left) return tile_of<Format::pairs, true>(rows, columns);
  }
  return tile_of<Format::pairs, false>(rows, columns);
}

}  // namespace recmas::cpu::RECMAS_ISA
