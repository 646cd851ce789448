// One left-hand row times a weight [k][columns] as it lies in memory: its rows are read in order, and the sums wait in
// the first-level cache. Panels would be laid out to be read once.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kSpan = 32 * kPanel;  // columns at a time

// Whether multiply_in_place serves a product of these terms.
template <int term_count>
inline bool in_place(const Term (&terms)[term_count], int64_t rows) {
  bool all = rows == 1;
  for (const Term& term : terms) all = all && term.right.layout == Layout::rows && !term.left.bf16;
  return all;
}

// chain [columns] += (fresh: =) left [depth] x right [depth][columns].
template <int depth, class Stored>
inline void add_rows(const float* left, const Stored* right, int64_t stride, Dtype compute, int64_t columns, bool fresh,
                     float* chain) {
  Vec value[depth];
  for (int i = 0; i < depth; ++i) value[i] = set1(left[i]);
  each_vector(columns, [&](int64_t c, auto lanes) {
    Vec sum = fresh ? set1(0.0f) : load(chain + c);
    for (int i = 0; i < depth; ++i) sum = fma(value[i], load_rounded(right + i * stride + c, compute, lanes), sum);
    store(chain + c, sum);
  });
}

// sums [columns] += left [k] x columns [first_column, first_column + columns) of right.
inline void add_product(const float* left, const Right& right, int64_t first_column, int64_t columns, float* sums) {
  alignas(64) float chain[kSpan];
  typed(right.data, right.dtype, [&](const auto* data) {
    for (int64_t first = 0; first < right.k; first += kChain) {
      const int64_t last = smaller(first + kChain, right.k);
      int64_t k = first;
      const auto* row = data + first * right.stride + first_column;
      for (; k + 4 <= last; k += 4, row += 4 * right.stride) {
        add_rows<4>(left + k, row, right.stride, right.compute, columns, k == first, chain);
      }
      for (; k < last; ++k, row += right.stride) {
        add_rows<1>(left + k, row, right.stride, right.compute, columns, k == first, chain);
      }
      for (int64_t c = 0; c < columns; c += kWidth) store(sums + c, add(load(sums + c), load(chain + c)));
    }
  });
}

template <int term_count, class Start, class Finish>
void multiply_in_place(const Team& team, const Term (&terms)[term_count], int64_t columns, const Start& start,
                       const Finish& finish) {
  const int64_t panels = panel_count(columns), end = team.end(panels) * kPanel;
  for (int64_t first = team.begin(panels) * kPanel; first < end; first += kSpan) {
    const int64_t last = smaller(smaller(first + kSpan, end), columns);
    alignas(64) float sums[kSpan];
    for (int64_t c = 0; c < kSpan; c += kPanel) {
      if (first + c >= last || !start(0, 1, first + c, smaller(kPanel, last - first - c), sums + c)) {
        clear_tile(1, sums + c);
      }
    }
    for (const Term& term : terms) {
      add_product(static_cast<const float*>(term.left.row(0)), term.right, first, last - first, sums);
    }
    for (int64_t column = first; column < last; column += kPanel) {
      finish(0, 1, column, smaller(kPanel, last - column), sums + (column - first));
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
