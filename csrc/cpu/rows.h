// LayerNorm over rows, forward and backward, and sums over columns. Rows are widened into fp32 lines first, so that
// the branch on the storage type stays outside the loops. Statistics are fp32, two passes over the line.
#pragma once

#include "product.h"

namespace recmas::cpu::RECMAS_ISA {

struct Matrix {  // any storage type, row stride in elements
  const void* data;
  Dtype dtype;
  int64_t stride;

  void line(int64_t row, int64_t column, int64_t columns, float* out) const {
    load_line(data, dtype, row * stride + column, columns, out);
  }
};

inline Matrix as_matrix(const Left& left) { return {left.data, left.dtype(), left.stride}; }

// Biases and gains as the loops read them: fp32, null if absent.
inline Vec gain_at(const float* gain, int64_t column, Whole) {
  return gain == nullptr ? set1(1.0f) : load(gain + column);
}
inline Vec gain_at(const float* gain, int64_t column, Part part) {
  return gain == nullptr ? set1(1.0f) : load(gain + column, part);
}
template <class Lanes>
inline Vec bias_at(const float* bias, int64_t column, Lanes lanes) {
  return bias == nullptr ? set1(0.0f) : load(bias + column, lanes);
}

struct RowStatistics {
  float mean, reciprocal;  // 1 / sqrt(variance + eps)
};

inline Vec keep(Vec value, Whole) { return value; }
inline Vec keep(Vec value, Part part) {  // lanes beyond the row become 0
  float lanes[kWidth] = {};
  store(lanes, value, part);
  return load(lanes);
}

inline RowStatistics row_statistics(const float* line, int64_t columns, float eps) {
  // Four sums side by side, since a lone one would wait for each of its additions.
  constexpr int64_t stride = 4 * kWidth;
  const int64_t whole = columns / stride * stride;
  Vec part[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t c = 0; c < whole; c += stride) {
    for (int i = 0; i < 4; ++i) part[i] = add(part[i], load(line + c + i * kWidth));
  }
  each_vector(columns - whole, [&](int64_t c, auto lanes) { part[0] = add(part[0], load(line + whole + c, lanes)); });
  const float mean = sum(add(add(part[0], part[1]), add(part[2], part[3]))) / static_cast<float>(columns);
  Vec squares[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t c = 0; c < whole; c += stride) {
    for (int i = 0; i < 4; ++i) {
      const Vec centred = sub(load(line + c + i * kWidth), set1(mean));
      squares[i] = fma(centred, centred, squares[i]);
    }
  }
  each_vector(columns - whole, [&](int64_t c, auto lanes) {
    const Vec centred = keep(sub(load(line + whole + c, lanes), set1(mean)), lanes);
    squares[0] = fma(centred, centred, squares[0]);
  });
  const Vec total = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
  return {mean, 1.0f / __builtin_sqrtf(sum(total) / static_cast<float>(columns) + eps)};
}

inline Vec normalised(Vec value, const RowStatistics& row) {
  return mul(sub(value, set1(row.mean)), set1(row.reciprocal));
}

// line = (line - mean) * reciprocal * gain + bias.
inline void norm_line(float* line, int64_t columns, const RowStatistics& row, const float* gain, const float* bias) {
  each_vector(columns, [&](int64_t c, auto lanes) {
    const Vec value = normalised(load(line + c, lanes), row);
    store(line + c, fma(value, gain_at(gain, c, lanes), bias_at(bias, c, lanes)), lanes);
  });
}

// Gradient through y = xhat * gain + bias, one row: gradient holds dy and receives
//     dx = reciprocal * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * gain
inline void norm_backward_line(float* gradient, const float* x, int64_t columns, const RowStatistics& row,
                               const float* gain) {
  Vec total = set1(0.0f), along = set1(0.0f);
  each_vector(columns, [&](int64_t c, auto lanes) {
    const Vec g = mul(load(gradient + c, lanes), gain_at(gain, c, lanes));  // 0 beyond the row
    total = add(total, g);
    along = fma(g, normalised(load(x + c, lanes), row), along);
  });
  const Vec mean = set1(sum(total) / static_cast<float>(columns));
  const Vec mean_along = set1(sum(along) / static_cast<float>(columns));
  each_vector(columns, [&](int64_t c, auto lanes) {
    const Vec g = mul(load(gradient + c, lanes), gain_at(gain, c, lanes));
    const Vec xhat = normalised(load(x + c, lanes), row);
    store(gradient + c, mul(set1(row.reciprocal), sub(sub(g, mean), mul(xhat, mean_along))), lanes);
  });
}

inline void add_line(float* line, const float* other, int64_t columns) {
  each_vector(columns, [&](int64_t c, auto lanes) {
    store(line + c, add(load(line + c, lanes), load(other + c, lanes)), lanes);
  });
}

constexpr int64_t kSumRows = 32;

// sums[column] (+)= sum over rows of what body(row, column, columns, line) puts into line. Each thread has columns of
// its own and takes rows in order; lines: 2 * columns floats of this thread's.
template <class Body>
inline void sum_columns(const Team& team, int64_t rows, int64_t columns, float* sums, bool accumulate, float* lines,
                        const Body& body) {
  const int64_t bands = (columns + kWidth - 1) / kWidth;
  const int64_t column = team.begin(bands) * kWidth;
  const int64_t width = smaller(team.end(bands) * kWidth, columns) - column;
  if (width <= 0) return;
  float *part = lines, *line = lines + width, *total = sums + column;
  if (!accumulate) __builtin_memset(total, 0, static_cast<size_t>(width) * sizeof(float));
  // Two levels: a single running sum over thousands of rows would lose bits that torch's cascade keeps.
  for (int64_t first = 0; first < rows; first += kSumRows) {
    body(first, column, width, part);
    for (int64_t r = first + 1; r < smaller(first + kSumRows, rows); ++r) {
      body(r, column, width, line);
      add_line(part, line, width);
    }
    add_line(total, part, width);
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
