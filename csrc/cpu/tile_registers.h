// AMX's tile registers of one thread, and what is done with one of them at a time.
#pragma once

#include "tile.h"

#if RECMAS_ISA_LEVEL >= 4

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kDepth = 16;     // steps of a panel that one register holds
constexpr int64_t kRegister = 16;  // rows of a register, and columns of its sums

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
template <int sum, int part>
void add_part();  // of registers 3 + part and 7
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
void load_part(const void* rows, int64_t bytes);
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
