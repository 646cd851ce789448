// Few left-hand rows times a weight [k][columns] as it lies in memory: its rows are read in order, and sums wait in the
// cache. Laying panels out takes longer: their columns are short pieces, each of another page.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kInPlaceRows = 48;
// Rows of the weight that add to a sum while it is in a register.
constexpr int kRowsAtOnce = RECMAS_ISA_LEVEL >= 2 ? 8 : 4;

// Whether multiply_in_place serves a product of these terms.
template <int term_count>
inline bool in_place(const Term (&terms)[term_count], int64_t rows) {
  bool all = rows <= kInPlaceRows;
  for (const Term& term : terms) all = all && term.right.layout == Layout::rows && !term.left.bf16;
  return all;
}

// Columns at a time, whole panels: sums and chains of all rows are kResidentBytes at most.
constexpr int64_t span_columns(int64_t rows) {
  return kResidentBytes / static_cast<int64_t>(2 * sizeof(float)) / rows / kPanel * kPanel;
}
static_assert(span_columns(kInPlaceRows) > 0, "a panel at least");

// What is multiplied: rows from `left` on, `left_stride` apart, and rows from `right` on.
template <class Stored>
struct Strip {
  const float* left;
  int64_t left_stride, rows;
  const Stored* right;
  int64_t right_stride;
  Dtype compute;
};

// chain [rows][span] += (fresh: =) left [rows][depth] x right [depth][vecs * kWidth].
template <int depth, int vecs, class Stored, class Lanes>
RECMAS_ALWAYS_INLINE void add_block(const Strip<Stored>& strip, bool fresh, float* chain, int64_t span, Lanes lanes) {
  Vec w[depth][vecs];
  for (int i = 0; i < depth; ++i) {
    for (int v = 0; v < vecs; ++v) {
      w[i][v] = load_rounded(strip.right + i * strip.right_stride + v * kWidth, strip.compute, lanes);
    }
  }
  const float* left = strip.left;
  for (int64_t r = 0; r < strip.rows; ++r, left += strip.left_stride, chain += span) {
    Vec sum[vecs];
    for (int v = 0; v < vecs; ++v) sum[v] = fresh ? set1(0.0f) : load(chain + v * kWidth);
    for (int i = 0; i < depth; ++i) {
      const Vec value = set1(left[i]);
      for (int v = 0; v < vecs; ++v) sum[v] = fma(value, w[i][v], sum[v]);
    }
    for (int v = 0; v < vecs; ++v) store(chain + v * kWidth, sum[v]);
  }
}

template <int depth, class Stored>
inline void add_rows(Strip<Stored> strip, int64_t columns, bool fresh, float* chain, int64_t span) {
  int64_t c = 0;
  for (; c + 2 * kWidth <= columns; c += 2 * kWidth, strip.right += 2 * kWidth) {
    add_block<depth, 2>(strip, fresh, chain + c, span, Whole{});
  }
  each_vector(columns - c, [&](int64_t at, auto lanes) {
    Strip<Stored> rest = strip;
    rest.right += at;
    add_block<depth, 1>(rest, fresh, chain + c + at, span, lanes);
  });
}

// sums [rows][span] += left [rows][k] x columns [0, columns) of the matrix [k][...] that begins at data.
template <class Stored>
inline void add_product(const Left& left, int64_t rows, const Right& right, const Stored* data, int64_t columns,
                        int64_t span, float* sums, float* chain) {
  Strip<Stored> strip{static_cast<const float*>(left.data), left.stride, rows, data, right.stride, right.compute};
  for (int64_t first = 0; first < right.k; first += kChain) {
    const int64_t last = smaller(first + kChain, right.k);
    int64_t k = first;
    const auto advance = [&](auto count) {
      add_rows<count.value>(strip, columns, k == first, chain, span);
      k += count.value;
      strip.left += count.value;
      strip.right += count.value * right.stride;
    };
    while (k + kRowsAtOnce <= last) advance(Constant<kRowsAtOnce>{});
    while (k < last) advance(Constant<1>{});
    for (int64_t r = 0; r < rows; ++r) {
      float *sum = sums + r * span, *line = chain + r * span;
      for (int64_t c = 0; c < columns; c += kWidth) store(sum + c, add(load(sum + c), load(line + c)));
    }
  }
}

// scratch: kResidentBytes.
template <int term_count, class Start, class Finish>
void multiply_in_place(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
                       const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns), end = team.end(panels) * kPanel;
  const int64_t span = smaller(span_columns(rows), end - team.begin(panels) * kPanel);
  float *const sums = reinterpret_cast<float*>(scratch), *const chain = sums + rows * span;
  for (int64_t first = team.begin(panels) * kPanel; first < end; first += span) {
    const int64_t last = smaller(smaller(first + span, end), columns);
    const auto each_tile = [&](const auto& body) {
      for (int64_t column = first; column < last; column += kPanel) {
        for (int64_t row = 0; row < rows; row += kTileRows) {
          body(row, smaller(kTileRows, rows - row), column, smaller(kPanel, last - column));
        }
      }
    };
    const auto each_line = [&](int64_t row, int64_t count, int64_t column, const auto& body) {
      for (int64_t r = 0; r < count; ++r) body(sums + (row + r) * span + column - first, r * kPanel);
    };
    alignas(64) float tile[kTileRows * kPanel];
    each_tile([&](int64_t row, int64_t count, int64_t column, int64_t width) {
      if (!start(row, count, column, width, tile)) clear_tile(count, tile);
      each_line(row, count, column, [&](float* line, int64_t at) {
        for (int64_t c = 0; c < kPanel; c += kWidth) store(line + c, load(tile + at + c));
      });
    });
    for (const Term& term : terms) {
      typed(term.right.data, term.right.dtype, [&](const auto* data) {
        add_product(term.left, rows, term.right, data + first, last - first, span, sums, chain);
      });
    }
    each_tile([&](int64_t row, int64_t count, int64_t column, int64_t width) {
      each_line(row, count, column, [&](const float* line, int64_t at) {
        for (int64_t c = 0; c < kPanel; c += kWidth) store(tile + at + c, load(line + c));
      });
      finish(row, count, column, width, tile);
    });
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
