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

  Dtype dtype() const { return bf16 ? Dtype::bf16 : Dtype::f32; }
  int64_t element_bytes() const { return bf16 ? 2 : 4; }
  int64_t bytes() const { return stride * element_bytes(); }
  void* row(int64_t r) const { return static_cast<char*>(data) + r * bytes(); }
};

// Whole vectors, and an odd number of cache lines: rows a power of two apart would share cache sets.
constexpr int64_t left_stride(int64_t k, bool bf16) {
  const int64_t line = bf16 ? 32 : 16;
  return (round_up(k, line) / line | 1) * line;
}

// Columns [column, column + columns) of row r from an fp32 line; what is stored is what the next product reads.
inline void store_left(const Left& left, int64_t r, int64_t column, int64_t columns, const float* line) {
  store_line(left.row(r), left.dtype(), column, columns, line);
}
inline void load_left(const Left& left, int64_t r, int64_t column, int64_t columns, float* line) {
  load_line(left.row(r), left.dtype(), column, columns, line);
}
// Zeroes what lies between k and the stride, which the last step of a product may read.
inline void pad_left(const Left& left, int64_t r, int64_t k) {
  __builtin_memset(static_cast<char*>(left.row(r)) + k * left.element_bytes(), 0,
                   static_cast<size_t>((left.stride - k) * left.element_bytes()));
}

struct Term {
  Left left;
  Right right;

  Format format() const {
    if (right.packed()) return packed_format(right.compute);
    return kDotPairs && left.bf16 ? Format::pairs : Format::f32;
  }
};

inline int64_t scratch_bytes(const Term& term) {
  return term.right.packed() ? 0 : panel_bytes(term.format(), term.right.k);
}

// A tile's rows as rows of a matrix of any storage type, and back.
inline void store_tile(void* data, Dtype dtype, int64_t stride, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, const float* tile) {
  typed(data, dtype, [&](auto* p) {
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = p + (row + r) * stride + column;
      const float* from = tile + r * kPanel;
      each_vector(columns, [&](int64_t c, auto lanes) { store(to + c, load(from + c), lanes); });
    }
  });
}
inline void load_tile(const void* data, Dtype dtype, int64_t stride, int64_t row, int64_t rows, int64_t column,
                      int64_t columns, float* tile) {
  typed(data, dtype, [&](const auto* p) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = p + (row + r) * stride + column;
      float* to = tile + r * kPanel;
      each_vector(columns, [&](int64_t c, auto lanes) { store(to + c, load(from + c, lanes)); });
    }
  });
}
inline void store_tile(const Left& left, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       const float* tile) {
  store_tile(left.data, left.dtype(), left.stride, row, rows, column, columns, tile);
}

inline void clear_tile(int64_t rows, float* tile) {
  for (int64_t i = 0; i < rows * kPanel; i += kWidth) store(tile + i, set1(0.0f));
}

// A product that starts from nothing.
inline bool start_fresh(int64_t, int64_t, int64_t, int64_t, float*) { return false; }

// What one group of rows prefetches for the next panel, which begins at `column`. Of a stored weight, its share of what
// that panel will be laid out from. Of a packed one, a line per step, so that many groups run several panels ahead:
// what the second-level cache cannot keep that long then waits in the third, no longer in memory.
inline Ahead ahead_of(const Term& term, const char* panel, int64_t column, int64_t group, int64_t groups) {
  const Right& right = term.right;
  const int64_t width = smaller(kPanel, right.columns - column);
  if (width <= 0) return {panel, 0, 1, 0};
  if (right.packed()) {
    const int64_t steps = panel_steps(term.format(), right.k);
    return {panel + panel_bytes(term.format(), right.k) + group * steps * 64, steps, 1, 64};
  }
  const int64_t bytes = dtype_bytes(right.dtype), stride = right.stride * bytes;
  const char* data = static_cast<const char*>(right.data);
  if (right.turned) return {panel, 0, 1, 0};  // laying it out prefetches
  const Ahead whole = right.transposed ? Ahead{data + column * stride, width, (right.k * bytes + 63) / 64, stride}
                                       : Ahead{data + column * bytes, right.k, (width * bytes + 63) / 64, stride};
  const int64_t begin = whole.rows * group / groups, end = whole.rows * (group + 1) / groups;
  return {whole.at + begin * stride, end - begin, whole.row_lines, stride};
}

// One tile: the sum over the terms, on top of what start put there; fresh: it put nothing there.
template <int term_count>
inline void multiply_terms(const Term (&terms)[term_count], const char* const (&panels)[term_count], int64_t row,
                           int64_t rows, int64_t column, int64_t columns, int64_t group, int64_t groups, bool fresh,
                           float* tile) {
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
    if (groups > 1) ahead = ahead_of(term, panels[i], column + kPanel, group, groups);
    choose_tile(format, term.left.bf16, rows,
                columns)({left, term.left.stride, panels[i], steps, tile, fresh && i == 0, ahead});
  }
}

// scratch: this thread's own, the sum of scratch_bytes over the terms.
// start(row, rows, column, columns, tile) -> whether it filled tile [rows][kPanel]; finish(...) consumes the tile.
template <int term_count, class Start, class Finish>
void multiply(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, char* scratch,
              const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns);
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  // Cut rows too where panels alone would leave threads idle; a panel packed here is then packed once per cut. Few
  // panels do not divide evenly, so with rows enough each thread takes rows of its own where nothing is packed here.
  bool by_rows = panels < 4 * team.size && groups >= 4 * team.size;
  for (const Term& term : terms) by_rows = by_rows && term.right.packed();
  const int64_t cuts = by_rows ? team.size : larger(smaller(groups, (4 * team.size + panels - 1) / panels), 1);
  int64_t packed_panel = -1;
  for (int64_t item = team.begin(panels * cuts); item < team.end(panels * cuts); ++item) {
    const int64_t panel = by_rows ? item % panels : item / cuts, cut = by_rows ? item / panels : item % cuts;
    const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
    const char* panels_at[term_count];
    char* scratch_at = scratch;
    for (int i = 0; i < term_count; ++i) {
      const Term& term = terms[i];
      const int64_t bytes = panel_bytes(term.format(), term.right.k);
      if (term.right.packed()) {
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
      const bool fresh = !start(row, count, column, width, tile);
      multiply_terms(terms, panels_at, row, count, column, width, group - first_group, last_group - first_group, fresh,
                     tile);
      finish(row, count, column, width, tile);
    }
  }
}

// With so few bytes in all panels of the right-hand matrix they stay in the second-level cache together: processors
// with AVX-512 have 1 MB of it, others down to 256 KB.
constexpr int64_t kResidentBytes = (RECMAS_ISA_LEVEL >= 2 ? 640 : 256) * 1024;

inline int64_t all_panels_bytes(const Term& term) {
  return panel_count(term.right.columns) * panel_bytes(term.format(), term.right.k);
}

// multiply() for one term whose panels are all resident: rows outermost, so that a row of the result is written whole
// while it is in the cache. scratch: all_panels_bytes.
template <class Start, class Finish>
void multiply_resident(const Team& team, const Term& term, int64_t rows, int64_t columns, char* scratch,
                       const Start& start, const Finish& finish) {
  const int64_t panels = panel_count(columns), bytes = panel_bytes(term.format(), term.right.k);
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  if (team.begin(groups) == team.end(groups)) return;
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack_panel(term.right, panel * kPanel, term.format(), scratch + panel * bytes);
  }
  const Term terms[1] = {term};
  for (int64_t group = team.begin(groups); group < team.end(groups); ++group) {
    const int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPanel, width = smaller(kPanel, columns - column);
      const char* const panels_at[1] = {scratch + panel * bytes};
      alignas(64) float tile[kTileRows * kPanel];
      const bool fresh = !start(row, count, column, width, tile);
      multiply_terms(terms, panels_at, row, count, column, width, group, groups, fresh, tile);
      finish(row, count, column, width, tile);
    }
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
