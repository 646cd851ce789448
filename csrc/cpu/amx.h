// Products of bf16 pairs in AMX's tile registers: 32 x 48 sums in six of the eight, 32 k at a time. Panels of pairs
// (tile.h) hold 16 steps one after the other as a register wants them, so packed weights are those of AVX512-BF16.
#pragma once

#include "left.h"
#include "tile_registers.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kTallRows = kMatrixTiles ? 32 : kTileRows;  // the most rows of any tile
constexpr int64_t kFewRows = 2;  // AVX-512 multiplies up to so many as fast: both wait for the panel

// Whether a product of so many rows uses tile registers, all of it: a last tile of few rows alone would round
// otherwise.
inline bool in_registers(const Left& left, int64_t rows) {
  return kMatrixTiles && left.bf16 && (left.parts > 1 || rows > kFewRows);
}

#if RECMAS_ISA_LEVEL >= 4

static_assert(kPanel == 3 * kRegister && kTallRows == 2 * kRegister, "six registers of sums");

// Sums `first` and the next, of 16 rows: += left x panel, kDepth steps.
template <int first, int vecs>
inline void multiply_registers(const char* left, int64_t left_bytes, const char* panel) {
  _tile_loadd(6, left, left_bytes);
  unrolled<vecs>([&](auto c) {
    _tile_loadd(7, panel + 64 * c.value, step_bytes(Format::pairs));
    add_product<first + c.value>();
  });
}

// The same for 16 rows that are split: registers 3 to 5 hold their parts, so that a piece of the panel is read once.
template <int vecs>
inline void multiply_parts(const char* left, int64_t left_bytes, int64_t part_bytes, const char* panel) {
  unrolled<kParts>([&](auto part) { load_part<part.value>(left + part * part_bytes, left_bytes); });
  unrolled<vecs>([&](auto c) {
    _tile_loadd(7, panel + 64 * c.value, step_bytes(Format::pairs));
    unrolled<kParts>([&](auto part) { add_part<c.value, part.value>(); });
  });
}

// call.out (+)= left x panel over the first `depths` times the steps of `shape`; two: kTallRows rows, else its rows.
// An instruction adds the kDepth steps in two chains, of even and of odd k, and these to the sum: so all k of a row are
// chains of 16 and one as long as there are instructions, more accurate than one over all k.
template <bool two, int vecs, int parts>
void multiply_depths(const TileCall& call, int64_t depths) {
  const char* left = static_cast<const char*>(call.left);
  const int64_t left_bytes = call.left_stride * 2, part_bytes = call.part_stride * 2;
  const char* panel = call.panel;
  float* const lower = call.out + kRegister * kPanel;
  Prefetcher prefetcher(call.ahead);
  const int64_t lines = (prefetcher.left() + depths - 1) / depths;  // with each depth
  TileRegisters::read_all(left);
  unrolled<vecs>([&](auto c) {
    call.fresh ? zero_sum<c.value>() : load_sum<c.value>(call.out + kRegister * c.value);
    if constexpr (two) call.fresh ? zero_sum<3 + c.value>() : load_sum<3 + c.value>(lower + kRegister * c.value);
  });
  for (int64_t depth = 0; depth < depths; ++depth, left += 64, panel += kDepth * step_bytes(Format::pairs)) {
    if (call.ahead.at == nullptr) {
      for (int64_t line = 0; line < kDepth * step_bytes(Format::pairs); line += 64) {
        __builtin_prefetch(panel + kFarPrefetch + line, 0, 2);
      }
    } else {
      prefetcher.advance(lines);
    }
    if constexpr (parts > 1 && !two) {
      multiply_parts<vecs>(left, left_bytes, part_bytes, panel);
      continue;
    }
    for (int part = 0; part < parts; ++part) {
      const char* at = left + part * part_bytes;
      multiply_registers<0, vecs>(at, left_bytes, panel);
      if constexpr (two) multiply_registers<3, vecs>(at + kRegister * left_bytes, left_bytes, panel);
    }
  }
  unrolled<vecs>([&](auto c) {
    store_sum<c.value>(call.out + kRegister * c.value);
    if constexpr (two) store_sum<3 + c.value>(lower + kRegister * c.value);
  });
}

template <bool two, int parts>
void multiply_depths(const TileCall& call, int64_t depths, int64_t columns) {
  if (columns <= kRegister) return multiply_depths<two, 1, parts>(call, depths);
  if (columns <= 2 * kRegister) return multiply_depths<two, 2, parts>(call, depths);
  multiply_depths<two, 3, parts>(call, depths);
}
template <bool two>
void multiply_depths(const TileCall& call, int64_t depths, int64_t columns) {
  if (call.parts == 1) return multiply_depths<two, 1>(call, depths, columns);
  multiply_depths<two, kParts>(call, depths, columns);
}

// What of a call concerns its rows from `row` on, and the steps from `step` on.
inline TileCall rest_of(const TileCall& call, int64_t row, int64_t step) {
  TileCall rest = call;
  rest.left = static_cast<const Bf16*>(call.left) + row * call.left_stride + 2 * step;
  rest.panel += step * step_bytes(Format::pairs);
  rest.out += row * kPanel;
  rest.fresh = call.fresh && step == 0;
  if (row > 0 || step > 0) rest.ahead = {call.panel, 0, 1, 0};  // asked for already
  return rest;
}

// The same for all rows, `depths` times `depth_steps` from `step` on.
inline void multiply_steps(TileRegisters& registers, const TileCall& call, int64_t rows, int64_t columns, int64_t step,
                           int64_t depths, int64_t depth_steps) {
  for (int64_t row = 0; row < rows;) {
    const bool two = rows - row >= kTallRows;
    const int64_t count = smaller(rows - row, two ? kTallRows : kRegister);
    registers.shape(smaller(count, kRegister), depth_steps, !two && call.parts > 1);
    const TileCall rest = rest_of(call, row, step);
    two ? multiply_depths<true>(rest, depths, columns) : multiply_depths<false>(rest, depths, columns);
    row += count;
  }
}

// The product of rows and pairs in bf16: whole registers, then shorter ones with the steps that are left. Which side of
// the product the rows are on, and how many, changes no bit: packed weights and stored ones (as_stored.h) must give the
// same.
inline void multiply_pairs(TileRegisters& registers, const TileCall& call, int64_t rows, int64_t columns) {
  const int64_t depths = call.steps / kDepth, left = call.steps % kDepth;
  if (depths > 0) multiply_steps(registers, call, rows, columns, 0, depths, kDepth);
  if (left > 0) multiply_steps(registers, call, rows, columns, depths * kDepth, 1, left);
}
#else
class TileRegisters {};
#endif

// One tile of a product: `rows` left-hand rows and `columns` <= kPanel columns. registers: null where it uses none.
inline void multiply_tile([[maybe_unused]] TileRegisters* registers, Format format, bool bf16_left, int64_t rows,
                          int64_t columns, const TileCall& call) {
#if RECMAS_ISA_LEVEL >= 4
  if (registers != nullptr) return multiply_pairs(*registers, call, rows, columns);
#endif
  choose_tile(format, bf16_left, rows, columns)(call);
}

}  // namespace recmas::cpu::RECMAS_ISA
