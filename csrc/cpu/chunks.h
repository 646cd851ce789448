// A product by chunks of panels: as many as stay in the second-level cache while all rows go past them. Tile registers
// multiply so fast that a panel must be laid out, or fetched from beyond that cache, once for all rows.
#pragma once

#include "whole.h"

namespace recmas::cpu::RECMAS_ISA {

template <int term_count>
inline int64_t panel_set_bytes(const Term (&terms)[term_count]) {
  int64_t bytes = 0;
  for (const Term& term : terms) bytes += panel_bytes(term.format(), term.right.k);
  return bytes;
}

// Panels of a chunk, each of so many bytes: the next chunk is fetched and rows pass through meanwhile.
constexpr int64_t chunk_panels(int64_t bytes) { return larger(kResidentBytes / bytes, 1); }

// The last groups of rows fetch the next chunk; what is fetched earlier does not outlast the rows that pass through.
// Each of the others fetches the next group's rows, `part` of `parts` of them with each panel: sixteen rows side by
// side are more streams than the processor follows by itself.
constexpr int64_t kLastGroups = 2;

inline Ahead rows_ahead(const Term& term, const Groups& groups, int64_t group, int64_t part, int64_t parts) {
  const int64_t first = groups.begin(group), count = groups.begin(group + 1) - first;
  const int64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;
  const int64_t bytes = term.left.parts > 1 ? term.left.bytes() : term.right.k * 2;
  return {static_cast<const char*>(term.left.row(begin)), end - begin, (bytes + 63) / 64, term.left.bytes()};
}

// Whether a product goes through its panels by chunks: one tile of rows reads packed ones once anyway.
template <int term_count>
inline bool in_chunks(const Term (&terms)[term_count], int64_t rows) {
  if (!in_registers(terms[0].left, rows)) return false;
  bool lays_out = false;
  for (const Term& term : terms) lays_out = lays_out || !term.right.packed();
  return lays_out || rows > kTallRows;
}

// What each thread needs to lay out at most `bytes` for each panel of a product; of fewer a chunk has more panels.
inline int64_t layout_bytes(bool bf16_left, int64_t columns, int64_t bytes) {
  if (bytes == 0 || !kMatrixTiles || !bf16_left) return bytes;
  return smaller(larger(kResidentBytes, bytes), panel_count(columns) * bytes);
}

// scratch: a chunk of the terms that are not packed.
template <int term_count, class Start, class Finish>
void multiply_chunks(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
                     const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns), chunk = chunk_panels(panel_set_bytes(terms));
  const Groups groups(rows, terms[0].left);
  TileRegisters registers;
  for (int64_t first = team.begin(panels); first < team.end(panels); first += chunk) {
    const int64_t count = smaller(chunk, team.end(panels) - first);
    const char* chunks[term_count];
    char* scratch_at = scratch;
    for (int i = 0; i < term_count; ++i) {
      const Term& term = terms[i];
      const int64_t bytes = term.right.panel_pitch(term.format());
      if (term.right.packed()) {
        chunks[i] = static_cast<const char*>(term.right.data) + first * bytes;
        continue;
      }
      chunks[i] = scratch_at;
      pack_panels(term.right, first * kPanel, count, term.format(), scratch_at);
      scratch_at += count * bytes;
    }
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t row = groups.begin(group), height = groups.begin(group + 1) - row;
      for (int64_t panel = 0; panel < count; ++panel) {
        const int64_t column = (first + panel) * kPanel, width = smaller(kPanel, columns - column);
        alignas(64) float tile[kTallRows * kPanel];
        const bool fresh = !start(row, height, column, width, tile);
        for (int i = 0; i < term_count; ++i) {
          const Term& term = terms[i];
          const char* at = chunks[i] + panel * term.right.panel_pitch(term.format());
          const int64_t left = groups.count - 1 - group;
          const Ahead ahead = left < kLastGroups ? ahead_of(term, at, chunk, column + chunk * kPanel,
                                                            kLastGroups - 1 - left, kLastGroups)
                                                 : rows_ahead(term, groups, group + 1, panel, count);
          multiply_tile(&registers, term.format(), true, height, width,
                        {term.left.row(row), term.left.stride, at, panel_steps(term.format(), term.right.k), tile,
                         fresh && i == 0, ahead, term.left.parts, term.left.part_stride()});
        }
        finish(row, height, column, width, tile);
      }
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
