// The one matrix product of the link: out[rows, columns] = start + sum over terms of left x right, followed by an
// epilogue on each finished tile. Two terms with a shared result make the linear residual part of the same sum.
#pragma once

#include "as_stored.h"
#include "chunks.h"
#include "in_place.h"
#include "library.h"
#include "pieces.h"
#include "whole.h"

namespace recmas::cpu::RECMAS_ISA {

// What a thread's products may use: its own memory, and a library's product.
struct Room {
  char* scratch;
  float* sums;  // of products in bands
  Sgemm* sgemm = nullptr;
};

// By the size of the product: by the library, in place, in bands, in pieces for few rows, or in whole panels.
template <int term_count, class Start, class Finish>
void multiply(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, const Room& room,
              const Start& start, const Finish& finish) {
  char* const scratch = room.scratch;
  int64_t pieces = 0;
  for (const Term& term : terms) pieces += piece_count(term.right.k);
  if (by_library(room.sgemm, terms, rows, columns)) {
    multiply_by_library(team, terms, rows, columns, room.sgemm, reinterpret_cast<float*>(scratch), start, finish);
  } else if (in_place(terms, rows)) {
    multiply_in_place(team, terms, rows, columns, scratch, start, finish);
  } else if (as_stored(terms, rows)) {
    multiply_as_stored(team, terms, rows, columns, scratch, start, finish);
  } else if (in_chunks(terms, rows)) {
    multiply_chunks(team, terms, rows, columns, scratch, start, finish);
  } else if (in_bands(terms[0].left.bf16, rows, columns, pieces)) {
    multiply_pieces(team, terms, rows, columns, kPiecePanels, scratch, room.sums, start, finish);
  } else if (rows < kManyRows && panel_count(columns) >= 2 * team.size && transposes(terms, rows)) {
    alignas(64) float few[kManyRows * kPanel];
    multiply_pieces(team, terms, rows, columns, 1, scratch, few, start, finish);
  } else {
    multiply_whole(team, terms, rows, columns, scratch, start, finish);
  }
}

inline int64_t all_panels_bytes(const Term& term) {
  return panel_count(term.right.columns) * panel_bytes(term.format(), term.right.k);
}

// multiply() for one term whose panels are all resident: rows outermost, so that a row of the result is written whole
// while it is in the cache. scratch: all_panels_bytes.
template <class Start, class Finish>
void multiply_resident(const Team& team, const Term& term, int64_t rows, int64_t columns, char* scratch,
                       const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns), bytes = panel_bytes(term.format(), term.right.k);
  const Groups rows_of(rows, term.left);
  const int64_t groups = rows_of.count;
  if (team.begin(groups) == team.end(groups)) return;
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack_panel(term.right, panel * kPanel, term.format(), scratch + panel * bytes);
  }
  const Term terms[1] = {term};
  TileRegisters registers;
  for (int64_t group = team.begin(groups); group < team.end(groups); ++group) {
    const int64_t row = rows_of.begin(group), count = rows_of.begin(group + 1) - row;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
      const char* const panels_at[1] = {scratch + panel * bytes};
      alignas(64) float tile[kTallRows * kPanel];
      const bool fresh = !start(row, count, column, width, tile);
      multiply_terms(terms, panels_at, row, count, column, width, group, groups, fresh,
                     rows_of.whole ? &registers : nullptr, tile);
      finish(row, count, column, width, tile);
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
