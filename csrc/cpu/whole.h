// A product by whole panels: each is read once, in order, by all groups of rows.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

// What one group of rows prefetches for the panel so many further, which begins at `column`. Of a stored weight, its
// share of what that panel will be laid out from. Of a packed one, a line per step, so that many groups run several
// panels ahead: what the second-level cache cannot keep that long then waits in the third, no longer in memory. Where
// pieces pass (below), its share of one panel.
inline Ahead ahead_of(const Term& term, const char* panel, int64_t further, int64_t column, int64_t group,
                      int64_t groups) {
  const Right& right = term.right;
  const int64_t width = smaller(kPanel, right.columns - column);
  if (width <= 0) return {panel, 0, 1, 0};
  if (right.packed()) {
    const int64_t steps = panel_steps(term.format(), right.k);
    const int64_t lines = kMatrixTiles ? (kPanelVecs * steps + groups - 1) / groups : steps;
    return {panel + further * right.panel_pitch(term.format()) + group * lines * 64, lines, 1, 64};
  }
  if (right.layout == Layout::turned_panels) return {panel, 0, 1, 0};  // laying it out prefetches
  if (right.layout == Layout::narrow_panels) {
    const Format format = packed_format(right.compute);
    const int64_t lines = panel_bytes(format, right.stride) / 64 / groups + 1;
    const char* next = static_cast<const char*>(right.data) + column / kPanel * panel_bytes(format, right.stride);
    return {next + group * lines * 64, lines, 1, 64};
  }
  const int64_t bytes = dtype_bytes(right.dtype), stride = right.stride * bytes;
  const char* data = static_cast<const char*>(right.data);
  const Ahead whole = right.layout == Layout::columns
                          ? Ahead{data + column * stride, width, (right.k * bytes + 63) / 64, stride}
                          : Ahead{data + column * bytes, right.k, (width * bytes + 63) / 64, stride};
  const int64_t begin = whole.rows * group / groups, end = whole.rows * (group + 1) / groups;
  return {whole.at + begin * stride, end - begin, whole.row_lines, stride};
}

// One tile: the sum over the terms, on top of what start put there; fresh: it put nothing there.
template <int term_count>
inline void multiply_terms(const Term (&terms)[term_count], const char* const (&panels)[term_count], int64_t row,
                           int64_t rows, int64_t column, int64_t columns, int64_t group, int64_t groups, bool fresh,
                           TileRegisters* registers, float* tile) {
  for (int i = 0; i < term_count; ++i) {
    const Term& term = terms[i];
    const void* left = term.left.row(row);
    if (panels[i] == nullptr) {
      if (fresh && i == 0) clear_tile(rows, tile);
      stream_tile(left, term.left.stride, term.left.bf16, rows, term.right, column, columns, tile);
      continue;
    }
    const Format format = term.format();
    const int64_t steps = panel_steps(format, term.right.k);
    // One group of rows reads each panel once, so the panel itself is prefetched. Several groups find it in the cache
    // after the first; they fetch what the next panel comes from meanwhile, each its own share.
    Ahead ahead{};
    if (groups > 1) ahead = ahead_of(term, panels[i], 1, column + kPanel, group, groups);
    multiply_tile(registers, format, term.left.bf16, rows, columns,
                  {left, term.left.stride, panels[i], steps, tile, fresh && i == 0, ahead, term.left.parts,
                   term.left.part_stride()});
  }
}

// With AMX, rows in fp32 pass a panel by pieces of k, so many groups of rows one after the other: a piece is then read
// from the first level, where whole panels lie in the second (docs/kernels.md, Float32 with AMX).
constexpr int64_t kPassingPiece = 128, kPassingGroups = 8;
static_assert(kPassingPiece % kChain == 0, "sums keep their bits");

// Groups [first, last) of rows pass the panels of one column.
template <int term_count, class Start, class Finish>
void pass_by_pieces(const Term (&terms)[term_count], const char* const (&panels)[term_count], const Groups& rows_of,
                    int64_t first, int64_t last, int64_t column, int64_t columns, const Start& start,
                    const Finish& finish) {
  for (int64_t begin = first; begin < last; begin += kPassingGroups) {
    const int64_t end = smaller(begin + kPassingGroups, last);
    alignas(64) float tiles[kPassingGroups][kTileRows * kPanel];
    bool fresh[kPassingGroups];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = rows_of.begin(group), rows = rows_of.begin(group + 1) - row;
      fresh[group - begin] = !start(row, rows, column, columns, tiles[group - begin]);
    }
    for (int i = 0; i < term_count; ++i) {
      const Term& term = terms[i];
      const Format format = term.format();
      const int64_t k = term.right.k, pieces = (k + kPassingPiece - 1) / kPassingPiece;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = piece * kPassingPiece, count = smaller(kPassingPiece, k - from);
        const char* at = panels[i] + panel_steps(format, from) * step_bytes(format);
        for (int64_t group = begin; group < end; ++group) {
          const int64_t row = rows_of.begin(group), rows = rows_of.begin(group + 1) - row;
          const int64_t parts = (last - first) * pieces;
          const Ahead ahead = ahead_of(term, panels[i], 1, column + kPanel, (group - first) * pieces + piece, parts);
          choose_tile(format, false, rows, columns)(
              {static_cast<const float*>(term.left.row(row)) + from, term.left.stride, at, panel_steps(format, count),
               tiles[group - begin], fresh[group - begin] && i == 0 && piece == 0, ahead});
        }
      }
    }
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = rows_of.begin(group), rows = rows_of.begin(group + 1) - row;
      finish(row, rows, column, columns, tiles[group - begin]);
    }
  }
}

// scratch: this thread's own, a panel of each term that is not packed.
// start(row, rows, column, columns, tile) -> whether it filled tile [rows][kPanel]; finish(...) consumes the tile.
template <int term_count, class Start, class Finish>
void multiply_whole(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
                    const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns);
  const Groups rows_of(rows, terms[0].left);
  const int64_t groups = rows_of.count;
  // Cut rows too where panels alone would leave threads idle; a panel packed here is then packed once per cut. Few
  // panels do not divide evenly, so with rows enough each thread takes rows of its own where nothing is packed here.
  bool by_rows = panels < 4 * team.size && groups >= 4 * team.size;
  for (const Term& term : terms) by_rows = by_rows && term.right.packed();
  const int64_t cuts = by_rows ? team.size : larger(smaller(groups, (4 * team.size + panels - 1) / panels), 1);
  const bool by_pieces = kMatrixTiles && !terms[0].left.bf16 && rows > kStreamLimit;  // with fewer, weights may stream
  int64_t packed_panel = -1;
  TileRegisters registers;
  for (int64_t item = team.begin(panels * cuts); item < team.end(panels * cuts); ++item) {
    const int64_t panel = by_rows ? item % panels : item / cuts, cut = by_rows ? item / panels : item % cuts;
    const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
    const char* panels_at[term_count];
    char* scratch_at = scratch;
    for (int i = 0; i < term_count; ++i) {
      const Term& term = terms[i];
      const int64_t bytes = term.right.panel_pitch(term.format());
      if (term.right.packed()) {
        panels_at[i] = static_cast<const char*>(term.right.data) + panel * bytes;
      } else if (streams(term.right, term.left, rows)) {
        panels_at[i] = nullptr;
      } else {
        if (packed_panel != panel) pack_panel(term.right, column, term.format(), scratch_at);
        panels_at[i] = scratch_at;
        scratch_at += bytes;
      }
    }
    packed_panel = panel;
    const int64_t first_group = groups * cut / cuts, last_group = groups * (cut + 1) / cuts;
    if (by_pieces && last_group - first_group > 1) {
      pass_by_pieces(terms, panels_at, rows_of, first_group, last_group, column, width, start, finish);
      continue;
    }
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t row = rows_of.begin(group), count = rows_of.begin(group + 1) - row;
      alignas(64) float tile[kTallRows * kPanel];
      const bool fresh = !start(row, count, column, width, tile);
      multiply_terms(terms, panels_at, row, count, column, width, group - first_group, last_group - first_group, fresh,
                     rows_of.whole ? &registers : nullptr, tile);
      finish(row, count, column, width, tile);
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
