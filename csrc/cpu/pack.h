// Laying a matrix out as panels (tile.h), from any storage type, rounded to the compute dtype on the way; and from the
// panels of its transpose, which gives the input gradient of a weight that exists as panels only.
#pragma once

#include "tile.h"

namespace recmas::cpu::RECMAS_ISA {

// What memory holds of the right-hand matrix of a product, which is [k][columns] in the mathematics.
enum class Layout {
  rows,           // [k][columns]
  columns,        // [columns][k]: a weight as nn.Linear stores it
  panels,         // in packed_format(compute); a product reads k of theirs, from any one on
  turned_panels,  // panels of the transpose, in packed_format(compute), the first k columns of it
  narrow_panels,  // panels of 16-bit elements, [stride][columns], that are laid out in fp32
};

struct Right {
  const void* data;
  Dtype dtype;
  int64_t stride;  // elements between memory rows; of panels, the k that each of them holds
  Layout layout;
  Form form;  // of what is stored: how it may be summed
  int64_t k, columns;
  Dtype compute;
  int64_t ahead = 256;  // bytes from a place in memory that is laid out to the one that is prefetched with it

  bool packed() const { return layout == Layout::panels; }
  int64_t panel_pitch(Format format) const { return panel_bytes(format, packed() ? stride : k); }
};

template <class Lanes>
inline Vec load_rounded(const float* p, Dtype compute, Lanes lanes) {
  return round_to(load(p, lanes), compute);
}
template <class Lanes>
inline Vec load_rounded(const F16* p, Dtype compute, Lanes lanes) {
  return round_to(load(p, lanes), compute == Dtype::bf16 ? Dtype::bf16 : Dtype::f32);
}
template <class Lanes>
inline Vec load_rounded(const Bf16* p, Dtype, Lanes lanes) {
  return load(p, lanes);
}

// `count` consecutive elements as bf16, two in each 32-bit lane; lanes beyond are 0.
inline Vec load_pair_line(const Bf16* p, int64_t count) {
  if (count >= 2 * kWidth) return load(reinterpret_cast<const float*>(p));
  Bf16 line[2 * kWidth] = {};
  for (int64_t i = 0; i < count; ++i) line[i] = p[i];
  return load(reinterpret_cast<const float*>(line));
}
template <class Stored>
inline Vec load_pair_line(const Stored* p, int64_t count) {
  Bf16 line[2 * kWidth];
  store(line, load(p, count));
  store(line + kWidth, count > kWidth ? load(p + kWidth, count - kWidth) : set1(0.0f));
  return load(reinterpret_cast<const float*>(line));
}

inline void store_step(char* panel, Format format, int64_t column, Vec value) {
  if (format == Format::f16) {
    store(reinterpret_cast<F16*>(panel) + column, value);
  } else {
    store(reinterpret_cast<float*>(panel) + column, value);
  }
}

constexpr int64_t kPackAhead = 12;  // steps between prefetching a piece of memory and packing it

// Memory holds [k][columns]: rows of a panel are pieces of rows of memory. Panels side by side are laid out together,
// `apart` bytes from each other, since a short piece wastes what is fetched with it.
template <class Stored>
void pack_rows(const Right& m, const Stored* from, int64_t columns, Format format, char* out, int64_t apart) {
  const int64_t steps = panel_steps(format, m.k), bytes = step_bytes(format);
  const int64_t width = columns * static_cast<int64_t>(sizeof(Stored));
  for (int64_t step = 0; step < steps; ++step, out += bytes) {
    // Pieces of rows a page apart: no hardware prefetcher follows them.
    const int64_t ahead = smaller(m.k - 1, (format == Format::pairs ? 2 : 1) * (step + kPackAhead));
    for (int64_t byte = 0; byte < width; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(from + ahead * m.stride) + byte);
      if (format == Format::pairs) {
        __builtin_prefetch(reinterpret_cast<const char*>(from + (ahead - (ahead > 0)) * m.stride) + byte);
      }
    }
    const int64_t per_step = format == Format::pairs ? 2 : 1;
    const bool second = 2 * step + 1 < m.k;
    char* panel = out;
    for (int64_t first = 0; first < columns; first += kPanel, panel += apart) {
      const Stored* row = from + per_step * step * m.stride + first;
      const int64_t present = smaller(kPanel, columns - first);
      for (int64_t c = round_up(present, kWidth); c < kPanel; c += kWidth) store_step(panel, format, c, set1(0.0f));
      each_vector(present, [&](int64_t c, auto lanes) {
        if (format != Format::pairs) return store_step(panel, format, c, load_rounded(row + c, m.compute, lanes));
        const Vec low = load_rounded(row + c, Dtype::bf16, lanes);
        const Vec high = second ? load_rounded(row + m.stride + c, Dtype::bf16, lanes) : set1(0.0f);
        store_step(panel, format, c, join_pairs(low, high));
      });
    }
  }
}

// Memory holds [columns][k]: blocks of kWidth x kWidth are transposed in registers.
template <Format format, class Stored>
void pack_transposed(const Right& m, const Stored* from, int64_t columns, char* out) {
  constexpr int64_t bytes = step_bytes(format), per_step = format == Format::pairs ? 2 : 1;
  constexpr Format lane = format == Format::f16 ? Format::f16 : Format::f32;
  const int64_t steps = panel_steps(format, m.k), k_end = m.k, stride = m.stride, ahead = m.ahead;
  const Dtype compute = m.compute;
  for (int64_t c = 0; c < kPanel; c += kWidth) {
    const int64_t present_columns = columns - c;
    for (int64_t step = 0; step < steps; step += kWidth) {
      const int64_t k = per_step * step, count = k_end - k;
      const Stored* rows = from + c * stride + k;
      Vec block[kWidth];
      if (present_columns >= kWidth && count >= per_step * kWidth) {
        int64_t apart = stride;
        __asm__("" : "+r"(apart));  // else each row gets a pointer of its own, which lies in memory
        const Stored* row = rows;
        for (int64_t i = 0; i < kWidth; ++i, row += apart) {
          __builtin_prefetch(reinterpret_cast<const char*>(row) + ahead, 0, 2);
          if constexpr (format == Format::pairs) {
            block[i] = load_pair_line(row, 2 * kWidth);
          } else {
            block[i] = load_rounded(row, compute, Whole{});
          }
        }
        transpose(block);
        for (int64_t i = 0; i < kWidth; ++i) store_step(out + (step + i) * bytes, lane, c, block[i]);
        continue;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        const Stored* row = rows + i * stride;
        if (i >= present_columns) {
          block[i] = set1(0.0f);
        } else if constexpr (format == Format::pairs) {
          block[i] = load_pair_line(row, count);
        } else {
          block[i] = load_rounded(row, compute, Part{count});
        }
      }
      transpose(block);
      const int64_t present = smaller(kWidth, steps - step);
      for (int64_t i = 0; i < present; ++i) store_step(out + (step + i) * bytes, lane, c, block[i]);
    }
  }
}

// Of panels [column / kPanel][k][kPanel], the block at k `first` of kWidth k and the kWidth columns from `column` on:
// on return block[c] holds one column, a k in each lane. k from `present` on are 0. What lies `ahead` bytes further is
// prefetched: the same block of a later panel, where no hardware prefetcher would look for it.
template <Format format>
inline void load_block(const char* panel, int64_t column, int64_t first, int64_t present, int64_t ahead,
                       Vec (&block)[kWidth]) {
  for (int64_t i = 0; i < kWidth; ++i) {
    const char* step = panel + (first + i) / (format == Format::pairs ? 2 : 1) * step_bytes(format);
    __builtin_prefetch(step + column * 4 + ahead);
    if (i >= present) {
      block[i] = set1(0.0f);
    } else if constexpr (format == Format::f16) {
      block[i] = load(reinterpret_cast<const F16*>(step) + column);
    } else {
      block[i] = load(reinterpret_cast<const float*>(step) + column);
      if constexpr (format == Format::pairs) block[i] = i % 2 == 0 ? low_halves(block[i]) : high_halves(block[i]);
    }
  }
  transpose(block);
}

// Calls body(block, column, k): every block of columns [0, columns) and k [first, first + count) of the panels.
// first and count are whole multiples of kWidth, but where the matrix ends.
template <class Body>
inline void each_block(const char* panels, Format format, int64_t k, int64_t columns, int64_t first, int64_t count,
                       const Body& body) {
  const int64_t bytes = panel_bytes(format, k);
  for (int64_t column = 0; column < columns; column += kWidth) {
    const char* panel = panels + column / kPanel * bytes;
    for (int64_t i = 0; i < count; i += kWidth) {
      Vec block[kWidth];
      if (format == Format::f32) load_block<Format::f32>(panel, column % kPanel, first + i, count - i, bytes, block);
      if (format == Format::f16) load_block<Format::f16>(panel, column % kPanel, first + i, count - i, bytes, block);
      if (format == Format::pairs)
        load_block<Format::pairs>(panel, column % kPanel, first + i, count - i, bytes, block);
      body(block, column, i);
    }
  }
}

// Columns [first_column, ...) of the matrix whose transpose's panels memory holds.
inline void pack_turned(const Right& m, int64_t first_column, int64_t columns, Format format, char* out) {
  const int64_t steps = panel_steps(format, m.k), bytes = step_bytes(format);
  const int64_t per_step = format == Format::pairs ? 2 : 1;
  each_block(static_cast<const char*>(m.data), packed_format(m.compute), m.columns, m.k, first_column, columns,
             [&](const Vec(&block)[kWidth], int64_t k, int64_t column) {
               for (int64_t i = 0; i < kWidth && k + i < m.k; i += per_step) {
                 const Vec value = format == Format::pairs ? join_pairs(block[i], block[i + 1]) : block[i];
                 store_step(out + (k + i) / per_step * bytes, format, column, value);
               }
             });
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t c = round_up(columns, kWidth); c < kPanel; c += kWidth)
      store_step(out + step * bytes, format, c, set1(0.0f));
  }
}

// The weight's row k of a panel: kWidth columns from `column` on, in fp32.
template <Format format>
inline Vec panel_row(const char* panel, int64_t k, int64_t column) {
  const char* step = panel + k / (format == Format::pairs ? 2 : 1) * step_bytes(format);
  if constexpr (format == Format::f16) return load(reinterpret_cast<const F16*>(step) + column);
  const Vec found = load(reinterpret_cast<const float*>(step) + column);
  if constexpr (format == Format::pairs) return k % 2 == 0 ? low_halves(found) : high_halves(found);
  return found;
}

template <Format format>
inline void widen_panel(const Right& m, int64_t first_column, char* out) {
  const char* panel = static_cast<const char*>(m.data) + first_column / kPanel * panel_bytes(format, m.stride);
  for (int64_t k = 0; k < m.k; ++k) {
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      store_step(out + k * step_bytes(Format::f32), Format::f32, c, panel_row<format>(panel, k, c));
    }
  }
}

// Columns [first_column, first_column + kPanel) of m; columns beyond the matrix become 0.
inline void pack_panel(const Right& m, int64_t first_column, Format format, char* panel) {
  const int64_t columns = smaller(kPanel, m.columns - first_column);
  if (m.layout == Layout::turned_panels) return pack_turned(m, first_column, columns, format, panel);
  if (m.layout == Layout::narrow_panels) {
    if (m.compute == Dtype::f16) return widen_panel<Format::f16>(m, first_column, panel);
    return widen_panel<Format::pairs>(m, first_column, panel);
  }
  typed(m.data, m.dtype, [&](const auto* data) {
    if (m.layout == Layout::columns) {
      const auto* rows = data + first_column * m.stride;
      if (format == Format::pairs) return pack_transposed<Format::pairs>(m, rows, columns, panel);
      if (format == Format::f16) return pack_transposed<Format::f16>(m, rows, columns, panel);
      pack_transposed<Format::f32>(m, rows, columns, panel);
    } else {
      pack_rows(m, data + first_column, columns, format, panel, 0);
    }
  });
}

// As many panels one after the other.
inline void pack_panels(const Right& m, int64_t first_column, int64_t panels, Format format, char* out) {
  const int64_t bytes = panel_bytes(format, m.k);
  if (m.layout == Layout::rows) {
    const int64_t columns = smaller(panels * kPanel, m.columns - first_column);
    return typed(m.data, m.dtype,
                 [&](const auto* data) { pack_rows(m, data + first_column, columns, format, out, bytes); });
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack_panel(m, first_column + panel * kPanel, format, out + panel * bytes);
  }
}

// The rows [rows][k] of a weight that one of its panels holds, in the dtype that the panel holds them in.
inline void unpack_panel(const char* panel, Format format, int64_t k, int64_t rows, void* out) {
  each_block(panel, format, k, rows, 0, k, [&](const Vec(&block)[kWidth], int64_t row, int64_t first) {
    const int64_t count = smaller(kWidth, k - first);
    for (int64_t r = 0; r < kWidth && row + r < rows; ++r) {
      const int64_t at = (row + r) * k + first;
      if (format == Format::f32) {
        store(static_cast<float*>(out) + at, block[r], count);
      } else if (format == Format::f16) {
        store(static_cast<F16*>(out) + at, block[r], count);
      } else {  // the upper halves as they are: narrowing might flush what is denormal
        uint32_t bits[kWidth];
        store(reinterpret_cast<float*>(bits), block[r]);
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[at + i] = static_cast<uint16_t>(bits[i] >> 16);
      }
    }
  });
}

inline int64_t panel_count(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace recmas::cpu::RECMAS_ISA
