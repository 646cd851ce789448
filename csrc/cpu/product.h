// The one matrix product of the link: out[rows, columns] = start + sum over terms of left x right, followed by an
// epilogue on each finished tile. Two terms with a shared result make the linear residual part of the same sum.
#pragma once

#include "stream.h"
#include "threads.h"

namespace recmas::cpu::RECMAS_ISA {

struct Left {  // [rows][stride], fp32 or bf16; zero from k up to the stride
  void* data;
  int64_t stride;
  bool bf16;

  int64_t bytes() const { return stride * (bf16 ? 2 : 4); }
  void* row(int64_t r) const { return static_cast<char*>(data) + r * bytes(); }
};

// Whole vectors, and an odd number of cache lines: rows a power of two apart would share cache sets.
constexpr int64_t left_stride(int64_t k, bool bf16) {
  const int64_t line = bf16 ? 32 : 16;
  return (round_up(k, line) / line | 1) * line;
}

// Columns [column, column + count) of row r; the stored value is what the next product reads.
inline void store_left(const Left& left, int64_t r, int64_t column, Vec value, int64_t count) {
  if (left.bf16) {
    store(static_cast<Bf16*>(left.row(r)) + column, value, count);
  } else {
    store(static_cast<float*>(left.row(r)) + column, value, count);
  }
}
inline Vec load_left(const Left& left, int64_t r, int64_t column, int64_t count) {
  return load_any(left.row(r), left.bf16 ? Dtype::bf16 : Dtype::f32, column, count);
}
// Zeroes what lies between k and the stride, which the last step of a product may read.
inline void pad_left(const Left& left, int64_t r, int64_t k) {
  for (int64_t column = k; column < left.stride; column += kWidth) {
    store_left(left, r, column, set1(0.0f), smaller(kWidth, left.stride - column));
  }
}

struct Term {
  Left left;
  Right right;

  Format format() const {
    if (right.packed) return packed_format(right.compute);
    return kDotPairs && left.bf16 ? Format::pairs : Format::f32;
  }
};

inline int64_t scratch_bytes(const Term& term) {
  return term.right.packed ? 0 : panel_bytes(term.format(), term.right.k);
}

// scratch: this thread's own, the sum of scratch_bytes over the terms.
// start(row, rows, column, columns, tile) fills tile [rows][kPanel]; finish(...) consumes it.
template <int term_count, class Start, class Finish>
void multiply(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
              const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns);
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  // Cut rows too where panels alone would leave threads idle; a panel packed here is then packed once per cut.
  const int64_t cuts = larger(smaller(groups, (4 * team.size + panels - 1) / panels), 1);
  int64_t packed_panel = -1;
  for (int64_t item = team.begin(panels * cuts); item < team.end(panels * cuts); ++item) {
    const int64_t panel = item / cuts, cut = item % cuts;
    const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
    const void* panels_at[term_count];
    char* scratch_at = scratch;
    for (int i = 0; i < term_count; ++i) {
      const Term& term = terms[i];
      const int64_t bytes = panel_bytes(term.format(), term.right.k);
      if (term.right.packed) {
        panels_at[i] = static_cast<const char*>(term.right.data) + panel * bytes;
      } else if (streams(term.right, term.left.bf16, rows)) {
        panels_at[i] = nullptr;
      } else {
        if (packed_panel != panel) pack_panel(term.right, column, term.format(), scratch_at);
        panels_at[i] = scratch_at;
        scratch_at += bytes;
      }
    }
    packed_panel = panel;
    const int64_t first_group = groups * cut / cuts, last_group = groups * (cut + 1) / cuts;
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
      alignas(64) float tile[kTileRows * kPanel];
      start(row, count, column, width, tile);
      for (int i = 0; i < term_count; ++i) {
        const Term& term = terms[i];
        const void* left = term.left.row(row);
        if (panels_at[i] == nullptr) {
          stream_tile(left, term.left.stride, term.left.bf16, count, term.right, column, width, tile);
        } else {
          choose_tile(term.format(), term.left.bf16, count, width)(
              left, term.left.stride, panels_at[i], panel_steps(term.format(), term.right.k), tile);
        }
      }
      finish(row, count, column, width, tile);
    }
  }
}

inline void start_at_zero(int64_t, int64_t rows, int64_t, int64_t, float* tile) {
  for (int64_t i = 0; i < rows * kPanel; i += kWidth) store(tile + i, set1(0.0f));
}

// Calls body(index into the matrix row, offset into the tile, count) for each vector of a tile.
template <class Body>
inline void for_each_vector(int64_t row, int64_t rows, int64_t column, int64_t columns, const Body& body) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      body(row + r, column + c, r * kPanel + c, smaller(kWidth, columns - c));
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
