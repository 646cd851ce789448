// Some rows times weights that tile registers read as nn.Linear stores them: rows of a weight become the left-hand
// side, and the rows, of which there are fewer, are laid out as its panels. Sums are those of packed weights, bit for
// bit.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

// Every thread lays the rows out for itself.
constexpr int64_t kAsStoredRows = 128;

template <int term_count>
inline bool as_stored(const Term (&terms)[term_count], int64_t rows) {
  bool all = rows <= kAsStoredRows;
  for (const Term& term : terms) {
    const Right& right = term.right;
    all = all && in_registers(term.left, rows) && term.left.parts == 1 && right.layout == Layout::columns &&
          right.dtype == Dtype::bf16 && right.k % 2 == 0;
  }
  return all;
}

// What each thread needs to lay rows of k elements out.
inline int64_t as_stored_bytes(bool bf16_left, int64_t rows, int64_t k) {
  if (!kMatrixTiles || !bf16_left) return 0;
  return panel_count(smaller(rows, kAsStoredRows)) * panel_bytes(Format::pairs, k);
}

// to [columns][kPanel] = from [rows][kPanel], whole blocks of kWidth.
inline void turn_tile(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = load(from + (r + i) * kPanel + c);
      transpose(block);
      for (int64_t i = 0; i < kWidth; ++i) store(to + (c + i) * kPanel + r, block[i]);
    }
  }
}

// Calls body(first, count) for parts of `rows` rows that a tile holds.
template <class Body>
inline void each_tile(int64_t rows, const Body& body) {
  for (int64_t first = 0; first < rows; first += kTallRows) body(first, smaller(kTallRows, rows - first));
}

template <int term_count, class Start, class Finish>
void multiply_as_stored(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
                        const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(rows);
  const Groups groups(columns, terms[0].left);  // of the weight's rows, which are multiplied as the left ones
  const char* laid_out[term_count];
  for (int i = 0; i < term_count; ++i) {
    const Term& term = terms[i];
    laid_out[i] = scratch;
    const Right turned{term.left.data, Dtype::bf16, term.left.stride, Layout::columns, Form::stored,
                       term.right.k,   rows,        Dtype::bf16};
    for (int64_t panel = 0; panel < panels; ++panel, scratch += panel_bytes(Format::pairs, term.right.k)) {
      pack_panel(turned, panel * kPanel, Format::pairs, scratch);
    }
  }
  TileRegisters registers;
  for (int64_t group = team.begin(groups.count); group < team.end(groups.count); ++group) {
    const int64_t column = groups.begin(group), width = groups.begin(group + 1) - column;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel * kPanel, height = smaller(kPanel, rows - row);
      alignas(64) float tile[kPanel * kPanel], turned[kTallRows * kPanel];
      bool fresh = true;
      each_tile(height, [&](int64_t first, int64_t count) {
        fresh = !start(row + first, count, column, width, tile + first * kPanel);
      });
      if (!fresh) turn_tile(tile, height, width, turned);
      for (int i = 0; i < term_count; ++i) {
        const Right& right = terms[i].right;
        const Left weight{{true}, const_cast<void*>(right.data), right.stride};  // only read
        const int64_t next = groups.begin(group + 1);
        const int64_t wanted = smaller(groups.rows - next, kTallRows);
        const Ahead ahead{static_cast<const char*>(weight.row(next + wanted * panel / panels)),
                          wanted * (panel + 1) / panels - wanted * panel / panels, (right.k * 2 + 63) / 64,
                          weight.bytes()};
        multiply_tile(&registers, Format::pairs, true, width, height,
                      {weight.row(column), right.stride, laid_out[i] + panel * panel_bytes(Format::pairs, right.k),
                       panel_steps(Format::pairs, right.k), turned, fresh && i == 0, ahead});
      }
      turn_tile(turned, width, height, tile);
      each_tile(height, [&](int64_t first, int64_t count) {
        finish(row + first, count, column, width, tile + first * kPanel);
      });
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
