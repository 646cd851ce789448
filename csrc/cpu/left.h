// The left-hand rows of a product, as it reads them.
#pragma once

#include "arena.h"
#include "split.h"

namespace recmas::cpu::RECMAS_ISA {

// How a product reads its left-hand rows.
struct LeftKind {
  bool bf16;
  int parts = 1;  // kParts: a row is so many of bf16, one after the other, which add up to one of fp32 (split.h)
};

struct Left : LeftKind {  // [rows][stride], fp32 or bf16; zero from k up to the stride
  void* data;
  int64_t stride;

  Dtype dtype() const { return bf16 ? Dtype::bf16 : Dtype::f32; }  // of each part
  int64_t element_bytes() const { return bf16 ? 2 : 4; }
  int64_t bytes() const { return stride * element_bytes(); }
  int64_t part_stride() const { return stride / parts; }  // elements
  void* row(int64_t r) const { return static_cast<char*>(data) + r * bytes(); }
};

// Whole vectors, and an odd number of cache lines: rows a power of two apart would share cache sets.
constexpr int64_t left_stride(int64_t k, LeftKind kind) {
  const int64_t line = kind.bf16 ? 32 : 16;
  return kind.parts * (round_up(k, line) / line | 1) * line;
}

inline Left take_left(Arena& arena, int64_t rows, int64_t k, LeftKind kind) {
  Left left{kind, nullptr, left_stride(k, kind)};
  left.data = arena.take(rows * left.bytes());
  return left;
}

// Calls body(pointer), which stores what the next product reads: of fp32, of bf16, or to parts.
template <class Body>
inline void write_row(const Left& left, int64_t r, const Body& body) {
  if constexpr (kMatrixTiles) {
    if (left.parts > 1) return body(SplitRow{static_cast<Bf16*>(left.row(r)), left.part_stride()});
  }
  if (left.bf16) return body(static_cast<Bf16*>(left.row(r)));
  body(static_cast<float*>(left.row(r)));
}

// Columns [column, column + columns) of row r from an fp32 line.
inline void store_left(const Left& left, int64_t r, int64_t column, int64_t columns, const float* line) {
  write_row(left, r, [&](auto row) {
    each_vector(columns, [&](int64_t c, auto lanes) { store(row + (column + c), load(line + c, lanes), lanes); });
  });
}
// Of rows that are not split.
inline void load_left(const Left& left, int64_t r, int64_t column, int64_t columns, float* line) {
  load_line(left.row(r), left.dtype(), column, columns, line);
}
// Zeroes what lies between k and the stride, which the last step of a product may read.
inline void pad_left(const Left& left, int64_t r, int64_t k) {
  for (int64_t part = 0; part < left.parts; ++part) {
    __builtin_memset(static_cast<char*>(left.row(r)) + (part * left.part_stride() + k) * left.element_bytes(), 0,
                     static_cast<size_t>((left.part_stride() - k) * left.element_bytes()));
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
