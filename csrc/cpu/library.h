// A product in fp32 by a library, block by block of the result: each thread has its own blocks, and finishes one while
// its cache holds it.
#pragma once

#include "terms.h"

namespace recmas::cpu::RECMAS_ISA {

// On processors with AMX, MKL multiplies fp32 faster than our tiles from these sizes on (docs/kernels.md).
constexpr int64_t kLibraryFewest = 128;       // rows, columns and k
constexpr int64_t kLibraryMost = 0x7fffffff;  // and strides: it takes numbers of 32 bits
constexpr double kLibraryFlops = 6e7;
constexpr int64_t kLibraryRows = 512, kLibraryColumns = 1024;  // of a block, at most

// The library, where it may multiply for this link; else null.
inline Sgemm* library_of(const LinkConfig& config) {
  const bool faster = kMatrixTiles && config.compute == Dtype::f32 && config.shape.tokens >= kLibraryFewest;
  return faster ? config.sgemm : nullptr;
}

inline bool library_multiplies(int64_t rows, int64_t columns, int64_t k) {
  return rows >= kLibraryFewest && columns >= kLibraryFewest && k >= kLibraryFewest && rows <= kLibraryMost &&
         columns <= kLibraryMost && k <= kLibraryMost &&
         2.0 * static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(k) >= kLibraryFlops;
}

// It takes no rows of memory that overlap, and none too far apart. row: elements of one.
inline bool library_reads(Dtype dtype, int64_t stride, int64_t row) {
  return dtype == Dtype::f32 && stride >= row && stride <= kLibraryMost;
}

template <int term_count>
inline bool by_library(Sgemm* sgemm, const Term (&terms)[term_count], int64_t rows, int64_t columns) {
  bool all = sgemm != nullptr;
  for (const Term& term : terms) {
    const Right& right = term.right;
    const bool in_rows = right.layout == Layout::rows, in_columns = right.layout == Layout::columns;
    all = all && (in_rows || in_columns) && right.form == Form::stored &&
          library_reads(right.dtype, right.stride, in_rows ? columns : right.k) &&
          library_multiplies(rows, columns, right.k);
  }
  return all;
}

// The weight as the library reads it; absent where it cannot.
inline Weight for_library(const Weight& weight) {
  if (weight.form == Form::packed) return {weight.packed_from, Dtype::f32, Form::stored};
  return {weight.dtype == Dtype::f32 ? weight.data : nullptr, Dtype::f32, Form::stored};
}

// Blocks of the result, of nearly equal size, and as many for each thread where there are columns enough.
struct LibraryBlocks {
  int64_t rows, columns, width, height, across, down;

  // most_rows: of a block that waits in the cache to be finished.
  LibraryBlocks(int64_t all_rows, int64_t all_columns, int64_t threads, int64_t most_rows)
      : rows(all_rows), columns(all_columns) {
    const int64_t fewest = (columns + kLibraryColumns - 1) / kLibraryColumns;
    across = smaller(round_up(fewest, threads), larger(columns / kLibraryFewest, 1));
    width = round_up((columns + across - 1) / across, kWidth);
    down = larger((rows + most_rows - 1) / most_rows, smaller(threads / across, rows / kTallRows));
    height = (rows + down - 1) / down;
  }

  int64_t count() const { return across * down; }
  int64_t row(int64_t block) const { return smaller(block % down * height, rows); }
  int64_t column(int64_t block) const { return smaller(block / down * width, columns); }
  int64_t stride() const { return left_stride(width, {false}); }
};

// What each thread needs for the products of a call by the library, if there is one, of any k.
struct LibraryRoom {
  Sgemm* sgemm;
  int64_t threads;
  int64_t bytes = 0;

  void add(int64_t rows, int64_t columns) {
    for (int64_t team = 1; sgemm != nullptr && team <= threads; ++team) {  // OpenMP may give fewer
      const LibraryBlocks blocks(rows, columns, team, kLibraryRows);
      bytes = larger(bytes, smaller(rows, kLibraryRows) * blocks.stride() * 4);
    }
  }
};

// result [rows][columns] (+)= those of left x right from `row` and `column` on.
inline void multiply_block(Sgemm* sgemm, const Term& term, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           bool add, float* result, int64_t stride) {
  const Right& right = term.right;
  const bool stored_turned = right.layout == Layout::columns;
  const float one = 1.0f, keep = add ? 1.0f : 0.0f;
  const float* weight = static_cast<const float*>(right.data) + column * (stored_turned ? right.stride : 1);
  const float* left = static_cast<const float*>(term.left.row(row));
  // Rows of memory are columns to it: it computes the transpose.
  sgemm(stored_turned ? "T" : "N", "N", &columns, &rows, &right.k, &one, weight, &right.stride, left, &term.left.stride,
        &keep, result, &stride);
}

template <int term_count, class Start, class Finish>
void multiply_by_library(const Team& team, const Term (&terms)[term_count], int64_t rows, int64_t columns, Sgemm* sgemm,
                         float* sums, const Start& start, const Finish& finish) {
  const LibraryBlocks blocks(rows, columns, team.size, kLibraryRows);
  const int64_t stride = blocks.stride();
  for (int64_t block = team.begin(blocks.count()); block < team.end(blocks.count()); ++block) {
    const int64_t row = blocks.row(block), height = smaller(blocks.height, rows - row);
    const int64_t column = blocks.column(block), width = smaller(blocks.width, columns - column);
    if (height <= 0 || width <= 0) continue;
    for (int i = 0; i < term_count; ++i) {
      multiply_block(sgemm, terms[i], row, height, column, width, i > 0, sums, stride);
    }
    for (int64_t r = 0; r < height; r += kTallRows) {
      const int64_t count = smaller(kTallRows, height - r);
      for (int64_t c = 0; c < width; c += kPanel) {
        const int64_t present = smaller(kPanel, width - c);
        alignas(64) float tile[kTallRows * kPanel];
        const bool fresh = !start(row + r, count, column + c, present, tile);
        for (int64_t i = 0; i < count; ++i) {
          const float* from = sums + (r + i) * stride + c;
          float* to = tile + i * kPanel;
          for (int64_t v = 0; v < kPanel; v += kWidth) {
            if (v >= present) break;
            const Vec sum = load(from + v);  // whole vectors: a block's rows are padded
            store(to + v, fresh ? sum : add(load(to + v), sum));
          }
        }
        finish(row + r, count, column + c, present, tile);
      }
    }
  }
}

// result [rows][columns] (+)= left^T right, left [k][rows]; right as memory holds it.
inline void add_by_library(const Team& team, Sgemm* sgemm, const Left& left, const Right& right, int64_t rows,
                           int64_t columns, bool add, float* result) {
  const LibraryBlocks blocks(rows, columns, team.size, rows);
  const float one = 1.0f, keep = add ? 1.0f : 0.0f;
  for (int64_t block = team.begin(blocks.count()); block < team.end(blocks.count()); ++block) {
    const int64_t row = blocks.row(block), height = smaller(blocks.height, rows - row);
    const int64_t column = blocks.column(block), width = smaller(blocks.width, columns - column);
    if (height <= 0 || width <= 0) continue;
    sgemm("N", "T", &width, &height, &right.k, &one, static_cast<const float*>(right.data) + column, &right.stride,
          static_cast<const float*>(left.data) + row, &left.stride, &keep, result + row * columns + column, &columns);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
