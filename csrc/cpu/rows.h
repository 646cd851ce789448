// LayerNorm over rows, forward and backward, and sums over columns. Statistics are fp32, two passes over the row.
#pragma once

#include "product.h"

namespace recmas::cpu::RECMAS_ISA {

struct Matrix {  // any storage type, row stride in elements
  const void* data;
  Dtype dtype;
  int64_t stride;

  Vec at(int64_t row, int64_t column, int64_t count) const { return load_any(data, dtype, row * stride + column, count); }
};

inline Matrix as_matrix(const Left& left) { return {left.data, left.bf16 ? Dtype::bf16 : Dtype::f32, left.stride}; }

inline Vec vector_at(const VectorView& vector, int64_t index, int64_t count, float absent) {
  return vector.data == nullptr ? set1(absent) : load_any(vector.data, vector.dtype, index, count);
}

struct RowStatistics {
  float mean, reciprocal;  // 1 / sqrt(variance + eps)
};

inline RowStatistics row_statistics(const Matrix& x, int64_t row, int64_t columns, float eps) {
  Vec total = set1(0.0f);
  for (int64_t c = 0; c < columns; c += kWidth) total = add(total, x.at(row, c, smaller(kWidth, columns - c)));
  const float mean = sum(total) / static_cast<float>(columns);
  Vec squares = set1(0.0f);
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = smaller(kWidth, columns - c);
    Vec centred = sub(x.at(row, c, count), set1(mean));
    if (count < kWidth) {
      float line[kWidth] = {};
      store(line, centred, count);
      centred = load(line);
    }
    squares = fma(centred, centred, squares);
  }
  const float variance = sum(squares) / static_cast<float>(columns);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

inline Vec normalised(Vec value, const RowStatistics& row) {
  return mul(sub(value, set1(row.mean)), set1(row.reciprocal));
}

// One row of the gradient through y = xhat * weight + bias:
//     dx = reciprocal * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight
// and put(column, dx, count) for each vector.
template <class Put>
inline void norm_backward_row(const Matrix& dy, const Matrix& x, int64_t row, int64_t columns,
                              const RowStatistics& statistics, const VectorView& weight, const Put& put) {
  Vec total = set1(0.0f), along = set1(0.0f);
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = smaller(kWidth, columns - c);
    const Vec g = mul(dy.at(row, c, count), vector_at(weight, c, count, 1.0f));  // 0 beyond count
    total = add(total, g);
    along = fma(g, normalised(x.at(row, c, count), statistics), along);
  }
  const Vec mean = set1(sum(total) / static_cast<float>(columns));
  const Vec mean_along = set1(sum(along) / static_cast<float>(columns));
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = smaller(kWidth, columns - c);
    const Vec g = mul(dy.at(row, c, count), vector_at(weight, c, count, 1.0f));
    const Vec xhat = normalised(x.at(row, c, count), statistics);
    put(c, mul(set1(statistics.reciprocal), sub(sub(g, mean), mul(xhat, mean_along))), count);
  }
}

constexpr int64_t kSumRows = 32;

// sums[column] (+)= sum over rows of body(row, column, count). Each thread has its own columns, rows in order.
template <class Body>
inline void sum_columns(const Team& team, int64_t rows, int64_t columns, float* sums, bool accumulate, const Body& body) {
  const int64_t vectors = (columns + kWidth - 1) / kWidth;
  for (int64_t i = team.begin(vectors); i < team.end(vectors); ++i) {
    const int64_t c = i * kWidth, count = smaller(kWidth, columns - c);
    Vec total = accumulate ? load(sums + c, count) : set1(0.0f);
    // Two levels: a single running sum over thousands of rows would lose bits that torch's cascade keeps.
    for (int64_t first = 0; first < rows; first += kSumRows) {
      Vec part = set1(0.0f);
      for (int64_t r = first; r < smaller(first + kSumRows, rows); ++r) part = add(part, body(r, c, count));
      total = add(total, part);
    }
    store(sums + c, total, count);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
