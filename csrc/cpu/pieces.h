// A product by pieces of k. A piece of a panel stays in the first-level cache until it was read; sums wait in memory.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

// Few rows lay a weight out piece by piece, and read each piece at once.
//
// Many rows, with AVX2: a piece of a panel serves a band of rows, the same piece of the band serves all panels from the
// second level. Whole panels would be read from the second level and left-hand rows from the third, and 16 columns do
// too little with each. With AVX-512, 48 columns do enough: pieces lost there.
constexpr int64_t kPiece = RECMAS_ISA_LEVEL == 1 ? 256 : 128;  // a multiple of kChain, so that sums keep their bits
static_assert(RECMAS_ISA_LEVEL != 1 || kPiece % kPanel == 0, "pieces of a turned weight are whole panels");
constexpr int64_t kManyRows = 48;     // the fewest that are many
constexpr int64_t kBandGroups = 24;   // of kTileRows rows
constexpr int64_t kPiecePanels = 64;  // at a time

inline int64_t piece_count(int64_t k) { return (k + kPiece - 1) / kPiece; }

// Of a product whose terms have so many pieces together.
inline bool in_bands(bool bf16_left, int64_t rows, int64_t columns, int64_t pieces) {
  const int64_t fewest = pieces > 1 ? kManyRows : 2 * kBandGroups * kTileRows;
  return RECMAS_ISA_LEVEL == 1 && !bf16_left && rows >= fewest && columns >= 16 * kPanel;
}

// What each thread needs for the products in bands among those of a call: the most that one of them does. A
// last block of fewer rows needs no more.
struct BandRoom {
  bool bf16_left;
  int64_t sums = 0;     // floats
  int64_t scratch = 0;  // bytes

  void add(int64_t rows, int64_t columns, int64_t pieces) {
    if (!in_bands(bf16_left, rows, columns, pieces)) return;
    const int64_t panels = smaller(panel_count(columns), kPiecePanels);
    scratch = larger(scratch, panels * panel_bytes(Format::f32, kPiece));
    if (pieces > 1) sums = larger(sums, panels * rows * kPanel);
  }
};

inline Right piece_of(const Right& right, int64_t k, int64_t count) {
  Right piece = right;
  if (right.layout == Layout::turned_panels) {  // whole panels of the transpose
    piece.data =
        static_cast<const char*>(right.data) + k / kPanel * panel_bytes(packed_format(right.compute), right.columns);
    piece.k = count;
    return piece;
  }
  if (right.layout == Layout::narrow_panels) {
    const Format format = packed_format(right.compute);
    piece.data = static_cast<const char*>(right.data) + panel_steps(format, k) * step_bytes(format);
    piece.k = count;
    return piece;
  }
  const bool transposed = right.layout == Layout::columns;
  const int64_t elements = transposed ? k : k * right.stride;
  piece.data = static_cast<const char*>(right.data) + elements * dtype_bytes(right.dtype);
  piece.k = count;
  // The next piece of the same rows of memory; at their end the first one of the next panel's.
  const int64_t next = k + kPiece < right.k ? kPiece : kPanel * right.stride - k;
  if (transposed) piece.ahead = next * dtype_bytes(right.dtype);
  return piece;
}

// Whether all weights are transposed on the way; others are copied, row by row of memory, which pieces interrupted.
template <int term_count>
inline bool transposes(const Term (&terms)[term_count], int64_t rows) {
  bool all = true;
  for (const Term& term : terms) {
    const Right& right = term.right;
    all = all && right.layout == Layout::columns && !streams(right, term.left, rows) && !term.left.bf16;
  }
  return all;
}

// multiply_pieces, of some panels and one piece of k. first, last: it is the first, the last of the sum.
template <class Start, class Finish>
void multiply_piece(const Term& term, Format format, int64_t k, bool first, bool last, int64_t first_panel,
                    int64_t last_panel, int64_t rows, int64_t columns, char* scratch, float* sums, const Start& start,
                    const Finish& finish) {
  const int64_t count = smaller(kPiece, term.right.k - k), steps = panel_steps(format, count);
  const int64_t bytes = term.right.packed() ? term.right.panel_pitch(format) : panel_bytes(format, kPiece);
  const char* pieces = scratch;
  if (term.right.packed()) {
    pieces =
        static_cast<const char*>(term.right.data) + first_panel * bytes + panel_steps(format, k) * step_bytes(format);
  }
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t first_group = 0; first_group < groups; first_group += kBandGroups) {
    const int64_t last_group = smaller(first_group + kBandGroups, groups);
    const int64_t lines = steps * step_bytes(format) / 64 / (last_group - first_group) + 1;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
      const char* piece = pieces + (panel - first_panel) * bytes;
      if (first_group == 0 && !term.right.packed()) {
        pack_panel(piece_of(term.right, k, count), column, format, scratch + (panel - first_panel) * bytes);
      }
      for (int64_t group = first_group; group < last_group; ++group) {
        const int64_t row = rows * group / groups, height = rows * (group + 1) / groups - row;
        alignas(64) float whole[kTileRows * kPanel];
        float* tile = first && last ? whole : sums + ((panel - first_panel) * rows + row) * kPanel;
        const bool fresh = first && !start(row, height, column, width, tile);
        const char* left = static_cast<const char*>(term.left.row(row)) + k * term.left.element_bytes();
        // Each group prefetches its share of the next panel's piece.
        const Ahead ahead{piece + bytes + (group - first_group) * lines * 64, panel + 1 < last_panel, lines, 0};
        choose_tile(format, term.left.bf16, height, width)({left, term.left.stride, piece, steps, tile, fresh, ahead});
        if (last) finish(row, height, column, width, tile);
      }
    }
  }
}

template <int term_count, class Start, class Finish>
void multiply_pieces(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns,
                     int64_t panels_at_a_time, char* scratch, float* sums, const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns);
  for (int64_t panel = team.begin(panels); panel < team.end(panels); panel += panels_at_a_time) {
    const int64_t last_panel = smaller(panel + panels_at_a_time, team.end(panels));
    for (int i = 0; i < term_count; ++i) {
      const Right& right = terms[i].right;
      // Few rows do not repay widening while it is laid out; the bits are the same.
      const bool as_pairs =
          rows < kManyRows && !right.packed() && right.dtype == Dtype::bf16 && right.compute == Dtype::bf16;
      const Format format = as_pairs ? Format::pairs : terms[i].format();
      for (int64_t k = 0; k < right.k; k += kPiece) {
        const bool last = i == term_count - 1 && k + kPiece >= terms[i].right.k;
        multiply_piece(terms[i], format, k, i == 0 && k == 0, last, panel, last_panel, rows, columns, scratch, sums,
                       start, finish);
      }
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
