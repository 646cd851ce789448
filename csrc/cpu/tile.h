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

// The left-hand rows of a tile from some k on. Rows are addressed from every third of them, with displacements for k:
// one pointer for all takes an addition per row and step, and those take slots from the multiply-adds.
template <bool bf16_left, int rows>
struct LeftRows {
  static constexpr int count = (rows + 2) / 3, bytes = bf16_left ? 2 : 4;
  const char* at[count];
  int64_t stride;

  LeftRows(const void* left, int64_t elements) : stride(elements * bytes) {
    for (int i = 0; i < count; ++i) at[i] = static_cast<const char*>(left) + 3 * i * stride;
  }
  // An fp32 element, or a pair of bf16 as one.
  float value(int row, int64_t k) const {
    float bits;
    __builtin_memcpy(&bits, at[row / 3] + row % 3 * stride + k * bytes, sizeof bits);
    return bits;
  }
  void advance(int64_t k) {
    for (int i = 0; i < count; ++i) {
      at[i] += k * bytes;
      asm("" : "+r"(at[i]));  // else the compiler keeps a pointer per row and step, more than there are registers
    }
  }
};

// acc += left[r][k] * panel[k][c] for the one or two k of a step; with two fp32 products the second goes to `odd`.
// left, panel: of the first of some steps, of which this is number `step`.
template <Format format, bool bf16_left, int rows, int vecs>
RECMAS_ALWAYS_INLINE void multiply_step(Accumulators<rows, vecs>& acc, Accumulators<rows, vecs>& odd,
                                        const LeftRows<bf16_left, rows>& left, const char* panel, int step) {
  panel += step * step_bytes(format);
  Vec w[vecs];
  if constexpr (format == Format::pairs && bf16_left) {
#if RECMAS_ISA_LEVEL >= 3
    for (int c = 0; c < vecs; ++c) w[c] = load(reinterpret_cast<const float*>(panel) + c * kWidth);
    unrolled<rows>([&](auto r) RECMAS_INLINED {
      const Vec pair = set1(left.value(r, 2 * step));
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = dot_pairs(acc.at[r][c], pair, w[c]);
    });
#endif
  } else if constexpr (format == Format::pairs) {
    // One k after the other: with both halves of the pairs widened at once, 6 x 16 sums left AVX2 two registers short
    // (docs/kernels.md, Pairs without native products).
    for (int c = 0; c < vecs; ++c) w[c] = low_halves(load(reinterpret_cast<const float*>(panel) + c * kWidth));
    unrolled<rows>([&](auto r) RECMAS_INLINED {
      const Vec value = set1(left.value(r, 2 * step));
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = fma(value, w[c], acc.at[r][c]);
    });
    for (int c = 0; c < vecs; ++c) w[c] = high_halves(load(reinterpret_cast<const float*>(panel) + c * kWidth));
    unrolled<rows>([&](auto r) RECMAS_INLINED {
      const Vec value = set1(left.value(r, 2 * step + 1));
      for (int c = 0; c < vecs; ++c) odd.at[r][c] = fma(value, w[c], odd.at[r][c]);
    });
  } else {
    for (int c = 0; c < vecs; ++c) {
      if constexpr (format == Format::f16) {
        w[c] = load(reinterpret_cast<const F16*>(panel) + c * kWidth);
      } else {
        w[c] = load(reinterpret_cast<const float*>(panel) + c * kWidth);
      }
    }
    unrolled<rows>([&](auto r) RECMAS_INLINED {
      const Vec value = set1(left.value(r, step));
      for (int c = 0; c < vecs; ++c) acc.at[r][c] = fma(value, w[c], acc.at[r][c]);
    });
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
  int parts = 1;            // of each left-hand row
  int64_t part_stride = 0;  // elements
};

// Prefetches an Ahead, some lines at a time.
class Prefetcher {
 public:
  explicit Prefetcher(const Ahead& ahead)
      : ahead_(ahead), left_(ahead.at == nullptr ? 0 : ahead.rows * ahead.row_lines) {}

  int64_t left() const { return left_; }
  void advance(int64_t lines) {
    for (; lines > 0 && left_ > 0; --lines, --left_) {
      __builtin_prefetch(ahead_.at + 64 * line_, 0, 2);
      if (++line_ == ahead_.row_lines) {
        line_ = 0;
        ahead_.at += ahead_.stride;
      }
    }
  }

 private:
  Ahead ahead_;
  int64_t left_, line_ = 0;
};

// out [rows][kPanel] += (fresh: =) left [rows][k] x panel [k][vecs * kWidth].
template <Format format, bool bf16_left, int rows, int vecs>
void multiply_tile(const TileCall& call) {
  constexpr int64_t chain_steps = format != Format::pairs ? kChain : (bf16_left ? kDotChain : kChain) / 2;
  // Few accumulators would wait for each other's additions: even and odd k get their own. Both halves of a pair of
  // fp32 products are k even and k odd, so that packed pairs and fp32 panels still give the same bits.
  constexpr bool few = rows * vecs <= 6;
  constexpr int sets = few ? 2 : 1;
  constexpr bool both_k = format == Format::pairs && !bf16_left;
  LeftRows<bf16_left, rows> left(call.left, call.left_stride);
  const char* at = call.panel;
  const bool own = call.ahead.at == nullptr;
  Prefetcher prefetcher(call.ahead);
  for (int64_t first = 0; first < call.steps; first += chain_steps) {
    Accumulators<rows, vecs> acc[sets];
    unrolled<sets>([&](auto set) RECMAS_INLINED {
      unrolled<rows>([&](auto r) RECMAS_INLINED {
        for (int c = 0; c < vecs; ++c) acc[set].at[r][c] = set1(0.0f);
      });
    });
    const auto advance = [&](auto count) RECMAS_INLINED {
      unrolled<count>([&](auto step) RECMAS_INLINED {
        constexpr int even = both_k ? 0 : step % sets, odd = sets - 1;
        multiply_step<format, bf16_left>(acc[even], acc[odd], left, at, step);
      });
      left.advance(count * (format == Format::pairs ? 2 : 1));
      at += count * step_bytes(format);
    };
    // Two steps at a time: additions and branches take slots from the multiply-adds where two threads share a core.
    int64_t steps = smaller(chain_steps, call.steps - first);
    for (; steps >= 2; steps -= 2) {
      if (own) {
        for (int64_t line = 0; line < 2 * step_bytes(format); line += 64) {
          if constexpr (few) {
            __builtin_prefetch(at + kFarPrefetch + line, 0, 2);
          } else {
            __builtin_prefetch(at + kPrefetch + line);
          }
        }
      } else {
        prefetcher.advance(2);
      }
      advance(Constant<2>{});
    }
    if (steps == 1) advance(Constant<1>{});
    const bool write = call.fresh && first == 0;
    unrolled<rows>([&](auto r) RECMAS_INLINED {
      for (int c = 0; c < vecs; ++c) {
        Vec total = acc[0].at[r][c];
        if constexpr (sets == 2) total = add(total, acc[1].at[r][c]);
        float* sum = call.out + r * kPanel + c * kWidth;
        store(sum, write ? total : add(load(sum), total));
      }
    });
  }
}

using TileFunction = void (*)(const TileCall& call);

template <Format format, bool bf16_left, int vecs>
TileFunction tile_of_rows(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<format, bf16_left, 1, vecs>;
    case 2:
      return multiply_tile<format, bf16_left, 2, vecs>;
    case 3:
      return multiply_tile<format, bf16_left, 3, vecs>;
    case 4:
      return multiply_tile<format, bf16_left, 4, vecs>;
#if RECMAS_ISA_LEVEL >= 1
    case 5:
      return multiply_tile<format, bf16_left, 5, vecs>;
    case 6:
      return multiply_tile<format, bf16_left, 6, vecs>;
#endif
#if RECMAS_ISA_LEVEL >= 2
    case 7:
      return multiply_tile<format, bf16_left, 7, vecs>;
    case 8:
      return multiply_tile<format, bf16_left, 8, vecs>;
#endif
    default:
      return nullptr;
  }
}

template <Format format, bool bf16_left>
TileFunction tile_of(int64_t rows, int64_t columns) {
  if (columns <= kWidth) return tile_of_rows<format, bf16_left, 1>(rows);
#if RECMAS_ISA_LEVEL >= 2
  if (columns > 2 * kWidth) return tile_of_rows<format, bf16_left, 3>(rows);
#endif
  return tile_of_rows<format, bf16_left, 2>(rows);
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
