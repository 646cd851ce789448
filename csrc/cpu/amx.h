// Products of bf16 pairs in AMX's tile registers: 32 x 48 sums in six of the eight, 32 k at a time. Panels of pairs
// (tile.h) hold 16 steps one after the other as a register wants them, so packed weights are those of AVX512-BF16.
#pragma once

#include "tile.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr bool kMatrixTiles = RECMAS_ISA_LEVEL >= 4;
constexpr int64_t kTallRows = kMatrixTiles ? 32 : kTileRows;  // the most rows of any tile

// The most rows of a product's tiles.
constexpr int64_t tile_rows(bool bf16_left) { return bf16_left ? kTallRows : kTileRows; }

#if RECMAS_ISA_LEVEL >= 4

constexpr int64_t kFewRows = 4;
constexpr int64_t kDepth = 16;      // steps of a panel that one register holds
constexpr int64_t kRegister = 16;   // rows of a register, and columns of its sums
static_assert(kPanel == 3 * kRegister && kTallRows == 2 * kRegister, "six registers of sums");

// This thread's tile registers: 0 to 5 hold sums, 6 left-hand rows, 7 a piece of the panel.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (rows_ != 0) _tile_release();
  }

  // Sums and left-hand rows get `rows` <= kRegister rows each; 70 ns where that is another number than before.
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    alignas(64) Layout layout{};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      layout.row_bytes[i] = 64;
      layout.rows[i] = static_cast<uint8_t>(i == 7 ? kDepth : rows);
    }
    read_all(&layout);
    _tile_loadconfig(&layout);
  }

  // The intrinsics do not tell the compiler what memory they read.
  static void read_all(const void* data) { __asm__ volatile("" : : "r"(data) : "memory"); }

 private:
  struct Layout {  // as LDTILECFG reads it
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  int64_t rows_ = 0;
};

// Prefetches what a call wants ahead, in as many turns of equal length.
class Prefetcher {
 public:
  Prefetcher(const Ahead& ahead, int64_t turns)
      : ahead_(ahead), left_(ahead.rows * ahead.row_lines), each_((left_ + turns - 1) / turns) {}

  void advance() {
    for (int64_t lines = smaller(each_, left_); lines > 0; --lines, --left_) {
      __builtin_prefetch(ahead_.at + 64 * line_, 0, 2);
      if (++line_ == ahead_.row_lines) {
        line_ = 0;
        ahead_.at += ahead_.stride;
      }
    }
  }

 private:
  Ahead ahead_;
  int64_t left_, each_, line_ = 0;
};

// Sums of registers 0 to 2 (second: 3 to 5) from and to rows of [kPanel] floats. The number of a register is part of
// the instruction.
template <bool second, int vecs>
inline void load_sums(const float* sums) {
  constexpr int64_t stride = kPanel * sizeof(float);
  if constexpr (second) {
    _tile_loadd(3, sums, stride);
    if constexpr (vecs > 1) _tile_loadd(4, sums + kRegister, stride);
    if constexpr (vecs > 2) _tile_loadd(5, sums + 2 * kRegister, stride);
  } else {
    _tile_loadd(0, sums, stride);
    if constexpr (vecs > 1) _tile_loadd(1, sums + kRegister, stride);
    if constexpr (vecs > 2) _tile_loadd(2, sums + 2 * kRegister, stride);
  }
}
template <bool second, int vecs>
inline void store_sums(float* sums) {
  constexpr int64_t stride = kPanel * sizeof(float);
  if constexpr (second) {
    _tile_stored(3, sums, stride);
    if constexpr (vecs > 1) _tile_stored(4, sums + kRegister, stride);
    if constexpr (vecs > 2) _tile_stored(5, sums + 2 * kRegister, stride);
  } else {
    _tile_stored(0, sums, stride);
    if constexpr (vecs > 1) _tile_stored(1, sums + kRegister, stride);
    if constexpr (vecs > 2) _tile_stored(2, sums + 2 * kRegister, stride);
  }
}
template <bool second, int vecs>
inline void multiply_registers(const char* left, int64_t left_bytes, const char* panel) {
  constexpr int64_t stride = step_bytes(Format::pairs);
  _tile_loadd(6, left, left_bytes);
  _tile_loadd(7, panel, stride);
  if constexpr (second) {
    _tile_dpbf16ps(3, 6, 7);
    if constexpr (vecs > 1) {
      _tile_loadd(7, panel + 64, stride);
      _tile_dpbf16ps(4, 6, 7);
    }
    if constexpr (vecs > 2) {
      _tile_loadd(7, panel + 128, stride);
      _tile_dpbf16ps(5, 6, 7);
    }
  } else {
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (vecs > 1) {
      _tile_loadd(7, panel + 64, stride);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (vecs > 2) {
      _tile_loadd(7, panel + 128, stride);
      _tile_dpbf16ps(2, 6, 7);
    }
  }
}

// call.out (+)= left x panel over the first `depths` times kDepth steps; two: kTallRows rows, else those of `shape`.
template <bool two, int vecs>
void multiply_depths(const TileCall& call, int64_t depths) {
  const char* left = static_cast<const char*>(call.left);
  const int64_t left_bytes = call.left_stride * 2;
  const char* panel = call.panel;
  float* const lower = call.out + kRegister * kPanel;
  Prefetcher prefetcher(call.ahead, depths);
  TileRegisters::read_all(left);
  if (call.fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if constexpr (two) {
      _tile_zero(3);
      _tile_zero(4);
      _tile_zero(5);
    }
  } else {
    load_sums<false, vecs>(call.out);
    if constexpr (two) load_sums<true, vecs>(lower);
  }
  for (int64_t depth = 0; depth < depths; ++depth, left += 64, panel += kDepth * step_bytes(Format::pairs)) {
    if (call.ahead.at == nullptr) {
      for (int64_t line = 0; line < kDepth * step_bytes(Format::pairs); line += 64) {
        __builtin_prefetch(panel + kFarPrefetch + line, 0, 2);
      }
    } else {
      prefetcher.advance();
    }
    multiply_registers<false, vecs>(left, left_bytes, panel);
    if constexpr (two) multiply_registers<true, vecs>(left + kRegister * left_bytes, left_bytes, panel);
  }
  store_sums<false, vecs>(call.out);
  if constexpr (two) store_sums<true, vecs>(lower);
}

template <bool two>
void multiply_depths(const TileCall& call, int64_t depths, int64_t columns) {
  if (columns <= kRegister) return multiply_depths<two, 1>(call, depths);
  if (columns <= 2 * kRegister) return multiply_depths<two, 2>(call, depths);
  multiply_depths<two, 3>(call, depths);
}
// What of a call concerns its rows from `row` on, and the steps from `step` on.
inline TileCall part_of(const TileCall& call, int64_t row, int64_t step) {
  TileCall part = call;
  part.left = static_cast<const Bf16*>(call.left) + row * call.left_stride + 2 * step;
  part.panel += step * step_bytes(Format::pairs);
  part.steps -= step;
  part.out += row * kPanel;
  part.fresh = call.fresh && step == 0;
  if (row > 0 || step > 0) part.ahead = {call.panel, 0, 1, 0};  // asked for already
  return part;
}

// The product of rows and pairs in bf16: whole registers, then the steps that are left.
inline void multiply_pairs(TileRegisters& registers, const TileCall& call, int64_t rows, int64_t columns) {
  const int64_t depths = call.steps / kDepth, whole = depths * kDepth;
  for (int64_t row = 0; depths > 0 && row < rows;) {
    const bool two = rows - row >= kTallRows;
    const int64_t count = smaller(rows - row, two ? kTallRows : kRegister);
    registers.shape(smaller(count, kRegister));
    if (two) {
      multiply_depths<true>(call, depths, columns);
    } else {
      multiply_depths<false>(row == 0 ? call : part_of(call, row, 0), depths, columns);
    }
    row += count;
  }
  for (int64_t row = 0; whole < call.steps && row < rows; row += kTileRows) {
    const int64_t count = smaller(kTileRows, rows - row);
    tile_of<Format::pairs, true>(count, columns)(part_of(call, row, whole));
  }
}
#else
class TileRegisters {};
#endif

// One tile of a product: `rows` <= tile_rows left-hand rows and `columns` <= kPanel columns.
inline void multiply_tile([[maybe_unused]] TileRegisters& registers, Format format, bool bf16_left, int64_t rows,
                          int64_t columns, const TileCall& call) {
#if RECMAS_ISA_LEVEL >= 4
  if (bf16_left && rows > kFewRows) return multiply_pairs(registers, call, rows, columns);
#endif
  choose_tile(format, bf16_left, rows, columns)(call);
}

}  // namespace recmas::cpu::RECMAS_ISA
