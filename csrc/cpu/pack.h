// Laying a matrix out as panels (tile.h), from any storage type, rounded to the compute dtype on the way.
#pragma once

#include "tile.h"

namespace recmas::cpu::RECMAS_ISA {

// The right-hand matrix of a product, [k][columns] in the mathematics.
struct Right {
  const void* data;
  Dtype dtype;
  int64_t stride;   // elements between memory rows
  bool transposed;  // memory holds [columns][k] (a weight as nn.Linear stores it), else [k][columns]
  bool packed;      // panels already, in packed_format(compute)
  int64_t k, columns;
  Dtype compute;
};

inline Vec load_rounded(const Right& m, int64_t index, int64_t count) {
  const Vec value = load_any(m.data, m.dtype, index, count);
  return m.dtype == Dtype::f32 ? round_to(value, m.compute) : value;
}

// Two consecutive elements of memory in each of kWidth 32-bit lanes, as bf16.
inline Vec load_pair_line(const Right& m, int64_t index, int64_t count) {
  Bf16 line[2 * kWidth];
  store(line, load_any(m.data, m.dtype, index, count));
  store(line + kWidth, load_any(m.data, m.dtype, index + (count > kWidth ? kWidth : 0), larger(count - kWidth, 0)));
  return load(reinterpret_cast<const float*>(line));
}

inline void store_step(char* panel, Format format, int64_t column, Vec value) {
  if (format == Format::f16) {
    store(reinterpret_cast<F16*>(panel) + column, value);
  } else {
    store(reinterpret_cast<float*>(panel) + column, value);
  }
}

// Columns [first_column, first_column + kPanel) of m; columns beyond the matrix become 0.
inline void pack_panel(const Right& m, int64_t first_column, Format format, void* panel) {
  char* out = static_cast<char*>(panel);
  const int64_t steps = panel_steps(format, m.k);
  const int64_t columns = smaller(kPanel, m.columns - first_column);
  const int64_t bytes = step_bytes(format);
  if (!m.transposed) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t c = 0; c < kPanel; c += kWidth) {
        const int64_t count = larger(smaller(kWidth, columns - c), 0);
        const int64_t column = first_column + (count > 0 ? c : 0);
        if (format == Format::pairs) {
          const bool second = 2 * step + 1 < m.k;
          const Vec low = load_any(m.data, m.dtype, 2 * step * m.stride + column, count);
          const Vec high = load_any(m.data, m.dtype, (2 * step + second) * m.stride + column, second ? count : 0);
          store_step(out + step * bytes, Format::f32, c, pack_pairs(low, high));
        } else {
          store_step(out + step * bytes, format, c, load_rounded(m, step * m.stride + column, count));
        }
      }
    }
    return;
  }
  const int64_t per_step = format == Format::pairs ? 2 : 1;
  for (int64_t c = 0; c < kPanel; c += kWidth) {
    for (int64_t step = 0; step < steps; step += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const bool present = c + i < columns;
        const int64_t count = present ? smaller(per_step * kWidth, m.k - per_step * step) : 0;
        const int64_t index = (first_column + (present ? c + i : 0)) * m.stride + per_step * step;
        block[i] = format == Format::pairs ? load_pair_line(m, index, count) : load_rounded(m, index, count);
      }
      transpose(block);
      for (int64_t i = 0; i < kWidth && step + i < steps; ++i) {
        store_step(out + (step + i) * bytes, format == Format::f16 ? format : Format::f32, c, block[i]);
      }
    }
  }
}

inline int64_t panel_count(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace recmas::cpu::RECMAS_ISA
