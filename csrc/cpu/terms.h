// What a matrix product multiplies: left-hand rows, terms of a sum, and the tiles that it hands on.
#pragma once

#include "stream.h"
#include "threads.h"

namespace recmas::cpu::RECMAS_ISA {

struct Term {
  Left left;
  Right right;

  Format format() const {
    if (right.packed()) return packed_format(right.compute);
    return kDotPairs && left.bf16 ? Format::pairs : Format::f32;
  }
};

// A product's rows in groups, each the rows of a tile: equal ones, or as many whole tiles as there are where these are
// registers.
struct Groups {
  int64_t rows, count;
  bool whole;

  Groups(int64_t all, const Left& left) : rows(all), whole(in_registers(left, all)) {
    const int64_t most = whole ? kTallRows : kTileRows;
    count = (all + most - 1) / most;
  }
  int64_t begin(int64_t group) const { return whole ? smaller(group * kTallRows, rows) : rows * group / count; }
};

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
  for (int64_t r = 0; r < rows; ++r) store_left(left, row + r, column, columns, tile + r * kPanel);
}

inline void clear_tile(int64_t rows, float* tile) {
  for (int64_t i = 0; i < rows * kPanel; i += kWidth) store(tile + i, set1(0.0f));
}

// With so few bytes in all panels of the right-hand matrix they stay in the second-level cache together: processors
// with AVX-512 have 1 MB of it, others down to 256 KB.
constexpr int64_t kResidentBytes = (RECMAS_ISA_LEVEL >= 2 ? 640 : 256) * 1024;

// A product that starts from nothing.
inline bool start_fresh(int64_t, int64_t, int64_t, int64_t, float*) { return false; }

}  // namespace recmas::cpu::RECMAS_ISA
