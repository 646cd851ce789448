// AMX's tile registers of one thread, and what is done with one of them at a time.
#pragma once

#include "tile.h"

#if RECMAS_ISA_LEVEL >= 4

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kDepth = 16;     // steps of a panel that one register holds, at most
constexpr int64_t kRegister = 16;  // rows of a register, and columns of its sums

// This thread's tile registers: 0 to 5 hold sums, 6 left-hand rows, 7 a piece of the panel. Of split rows (split.h) 3
// to 5 hold the parts instead.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (rows_ != 0) _tile_release();
  }

  // Sums and left-hand rows get `rows` <= kRegister rows each, left-hand rows and panel `steps` <= kDepth steps; 70 ns
  // where that is another shape than before. split: registers 3 to 5 hold left-hand rows.
  void shape(int64_t rows, int64_t steps, bool split) {
    if (rows == rows_ && steps == steps_ && (split == split_ || steps == kDepth)) return;
    rows_ = rows;
    steps_ = steps;
    split_ = split;
    alignas(64) Layout layout{};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      const bool is_left = i == 6 || (split && 3 <= i && i < 6);
      layout.row_bytes[i] = static_cast<uint16_t>(is_left ? 4 * steps : 64);
      layout.rows[i] = static_cast<uint8_t>(i == 7 ? steps : rows);
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
  int64_t rows_ = 0, steps_ = 0;
  bool split_ = false;
};

// The number of a register is part of the instruction. 0 to 5: sums, from and to rows of [kPanel] floats.
constexpr int64_t kSumStride = kPanel * sizeof(float);
template <int sum>
void zero_sum();
template <int sum>
void load_sum(const float* from);
template <int sum>
void store_sum(float* to);
template <int sum>
void add_product();  // of registers 6 and 7
#define RECMAS_SUM(sum)                          \
  template <>                                    \
  inline void zero_sum<sum>() {                  \
    _tile_zero(sum);                             \
  }                                              \
  template <>                                    \
  inline void load_sum<sum>(const float* from) { \
    _tile_loadd(sum, from, kSumStride);          \
  }                                              \
  template <>                                    \
  inline void store_sum<sum>(float* to) {        \
    _tile_stored(sum, to, kSumStride);           \
  }                                              \
  template <>                                    \
  inline void add_product<sum>() {               \
    _tile_dpbf16ps(sum, 6, 7);                   \
  }
RECMAS_SUM(0)
RECMAS_SUM(1)
RECMAS_SUM(2)
RECMAS_SUM(3)
RECMAS_SUM(4)
RECMAS_SUM(5)
#undef RECMAS_SUM

template <int part>
void load_part(const void* rows, int64_t bytes);  // to register 3 + part
template <int sum, int part>
void add_part();  // of registers 3 + part and 7
#define RECMAS_PART(part, in)                                    \
  template <>                                                    \
  inline void load_part<part>(const void* rows, int64_t bytes) { \
    _tile_loadd(in, rows, bytes);                                \
  }                                                              \
  template <>                                                    \
  inline void add_part<0, part>() {                              \
    _tile_dpbf16ps(0, in, 7);                                    \
  }                                                              \
  template <>                                                    \
  inline void add_part<1, part>() {                              \
    _tile_dpbf16ps(1, in, 7);                                    \
  }                                                              \
  template <>                                                    \
  inline void add_part<2, part>() {                              \
    _tile_dpbf16ps(2, in, 7);                                    \
  }
RECMAS_PART(0, 3)
RECMAS_PART(1, 4)
RECMAS_PART(2, 5)
#undef RECMAS_PART

}  // namespace recmas::cpu::RECMAS_ISA

#endif
