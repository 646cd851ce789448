// Products of frozen weights, which exist as panels only: y = x W^T + b, and the input gradient dx = dy W.
//
// Forward, rows that a product can read as they lie are neither copied nor waited for. Backward, a few rows are
// multiplied with the panels as they stand; for more, the panels are laid out again as those of the transpose, a piece
// at a time in the second-level cache. So no second form of a weight exists.
#pragma once

#include "arena.h"
#include "product.h"
#include "rows.h"

namespace recmas::cpu::RECMAS_ISA {

// Rows of a block forward: they stay in the second-level cache, or in the shared one where bands or chunks keep theirs.
constexpr int64_t frozen_rows(bool pairs) { return RECMAS_ISA_LEVEL == 1 ? 512 : kMatrixTiles && pairs ? 1024 : 128; }
constexpr int64_t kGradientRows = 512;    // and backward, where each block lays the weight out anew
constexpr int64_t kGradientDepth = 1920;  // out features laid out at a time, whole panels: at most 360 KB

// Of split rows (split.h), blocks of more than a tile's pass by shares of at most so many bytes of each row: those of a
// tile then stay in the second-level cache beside a chunk of panels. 512 rows of 4864 took 18 to 20 ms, whole 42 to 48.
constexpr int64_t kPassBytes = 12288;

constexpr int64_t kWholeFeatures = 32;  // of bf16, which one tile register multiplies; passes take whole ones
constexpr int64_t kSplitFewest = 9;     // rows in fp32 that are split for tile registers; fewer wait for memory anyway
constexpr int64_t kWidened = 24;        // rows from which on 16-bit panels are widened once, not in each tile
constexpr int64_t kGradientFew = 4;     // rows whose gradients need no other layout

// Threads that are worth starting: a byte from memory takes as long as 6 flops.
inline int64_t frozen_threads(int64_t threads, int64_t rows, int64_t k, int64_t columns, Dtype stored) {
  const double elements = static_cast<double>(k) * static_cast<double>(columns);
  const double flops = 2.0 * static_cast<double>(rows), bytes = static_cast<double>(dtype_bytes(stored));
  return useful_threads(threads, elements * (flops > 6.0 * bytes ? flops : 6.0 * bytes));
}

// How `rows` rows that have `dtype` are read by a product with panels of bf16, or others, for `columns` columns.
inline LeftKind left_kind(bool bf16_panels, Dtype dtype, int64_t rows, int64_t columns) {
  if (!kDotPairs || !bf16_panels) return {false};
  if (dtype == Dtype::bf16) return {true};
  const bool many = rows >= kSplitFewest && columns > kPanel;  // one panel takes less time than splitting its rows
  return kMatrixTiles && dtype == Dtype::f32 && many ? LeftKind{true, kParts} : LeftKind{false};
}

// Whether a product can read the rows as they lie: in the type it multiplies, with nothing beyond k to read, and
// not a multiple of 2 KB apart, where eight of them would share few sets of the first-level cache.
inline bool reads_in_place(const FrozenForward& call, LeftKind kind) {
  if (call.x.dtype != (kind.bf16 ? Dtype::bf16 : Dtype::f32)) return false;
  // Streaming reads whole vectors, packed pairs whole pairs.
  const int64_t whole = call.form == Form::stored ? 2 * kWidth : packed_format(call.stored) == Format::pairs ? 2 : 1;
  if (call.in_features % whole != 0) return false;
  return call.tokens <= 2 || call.x.stride * dtype_bytes(call.x.dtype) % 2048 != 0;
}

// What products in bands need, for each thread.
struct Bands {
  int64_t sum_floats, scratch_each;
  float* sums;
  char* scratch;

  Room room(const Team& team) const { return {scratch + team.rank * scratch_each, sums + team.rank * sum_floats}; }
};

inline Bands take_bands(Arena& arena, int64_t threads, const BandRoom& room, int64_t panel_scratch) {
  Bands bands{room.sums, larger(room.scratch, panel_scratch), nullptr, nullptr};
  bands.sums = arena.floats(threads * bands.sum_floats);
  bands.scratch = arena.take(threads * bands.scratch_each);
  return bands;
}

struct FrozenPlan {
  int64_t threads, block, workspace;
  int64_t depth;  // features of a pass; y keeps the sums
  bool in_place;
  Left rows;
  bool widens;
  Bands bands;
};

inline FrozenPlan plan_frozen(const FrozenForward& call, void* base) {
  FrozenPlan plan{};
  Arena arena(base);
  // A weight as it lies streams past rows in fp32.
  const bool bf16_panels = call.stored == Dtype::bf16 && (call.form == Form::packed || call.x.dtype == Dtype::bf16);
  const LeftKind kind = left_kind(bf16_panels, call.x.dtype, call.tokens, call.out_features);
  const bool pairs = kind.bf16;
  plan.threads = frozen_threads(call.threads, call.tokens, call.in_features, call.out_features, call.stored);
  plan.block = smaller(call.tokens, frozen_rows(pairs));
  plan.in_place = reads_in_place(call, kind);
  plan.depth = call.in_features;
  if (kind.parts > 1 && plan.block > kTallRows && call.y.dtype == Dtype::f32) {
    const int64_t passes = (kind.parts * call.in_features * dtype_bytes(Dtype::bf16) + kPassBytes - 1) / kPassBytes;
    plan.depth = round_up((call.in_features + passes - 1) / passes, kWholeFeatures);
  }
  plan.rows = {kind, nullptr, left_stride(plan.depth, kind)};
  if (!plan.in_place) plan.rows.data = arena.take(plan.block * plan.rows.bytes());
  BandRoom room{pairs};
  room.add(plan.block, call.out_features, piece_count(call.in_features));
  plan.widens = RECMAS_ISA_LEVEL <= 1 && plan.block >= kWidened && call.form == Form::packed &&
                call.stored != Dtype::f32 && !pairs;
  int64_t layout = plan.widens ? panel_bytes(Format::f32, call.in_features) : 0;
  if (call.form == Form::stored && pairs) {  // more rows than are streamed
    layout = larger(as_stored_bytes(true, call.tokens, call.in_features),
                    layout_bytes(true, call.out_features, panel_bytes(Format::pairs, call.in_features)));
  }
  plan.bands = take_bands(arena, plan.threads, room, layout);
  plan.workspace = arena.used();
  return plan;
}

// What a block of a result gathers in several passes: all but the last keep sums in fp32.
struct Gathered {
  Output result;
  int64_t columns, first;  // of all, the row where this block begins
  float* own;              // for the block's sums; null where the result keeps them
  bool begun, ends;

  float* sums() const { return own != nullptr ? own : static_cast<float*>(result.data) + first * columns; }
  void load(int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) const {
    load_tile(sums(), Dtype::f32, columns, row, rows, column, width, tile);
  }
  void store(int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) const {
    if (ends) {
      store_tile(result.data, result.dtype, columns, first + row, rows, column, width, tile);
    } else {
      store_tile(sums(), Dtype::f32, columns, row, rows, column, width, tile);
    }
  }
};

// Adds what in features [from, from + depth) give to rows [first, first + count).
inline void frozen_product(const Team& team, const FrozenForward& call, const FrozenPlan& plan, const Left& rows,
                           int64_t first, int64_t count, int64_t from, int64_t depth) {
  const int64_t columns = call.out_features;
  const Layout layout = plan.widens                 ? Layout::narrow_panels
                        : call.form == Form::packed ? Layout::panels
                                                    : Layout::columns;
  const Format format = packed_format(call.stored);
  const char* weight = static_cast<const char*>(call.weight) + panel_steps(format, from) * step_bytes(format);
  const Term terms[1] = {
      {rows, {weight, call.stored, call.in_features, layout, call.form, depth, columns, call.stored}}};
  const Gathered y{call.y, columns, first, nullptr, from > 0, from + depth == call.in_features};
  const auto start = [&](int64_t row, int64_t tile_rows, int64_t column, int64_t width, float* tile) {
    if (y.begun) {
      y.load(row, tile_rows, column, width, tile);
      return true;
    }
    if (call.bias.data == nullptr) return false;
    load_tile(call.bias.data, call.bias.dtype, 0, 0, tile_rows, column, width, tile);
    return true;
  };
  const auto finish = [&](int64_t row, int64_t tile_rows, int64_t column, int64_t width, float* tile) {
    y.store(row, tile_rows, column, width, tile);
  };
  multiply(team, terms, count, columns, plan.bands.room(team), start, finish);
}

// Rows [first, first + count) of a matrix, columns [column, column + columns), as a product reads them.
inline void copy_rows(const Team& team, const MatrixView& from, int64_t first, int64_t count, int64_t column,
                      int64_t columns, const Left& to) {
  for (int64_t r = team.begin(count); r < team.end(count); ++r) {
    const int64_t at = (first + r) * from.stride + column;
    typed(from.data, from.dtype, [&](const auto* p) {
      write_row(to, r, [&](auto row) {
        each_vector(columns, [&](int64_t c, auto lanes) { store(row + c, load(p + at + c, lanes), lanes); });
      });
    });
    pad_left(to, r, columns);
  }
}

inline int64_t frozen_forward_workspace(const FrozenForward& call) { return plan_frozen(call, nullptr).workspace; }

inline void frozen_forward(const FrozenForward& call, void* workspace) {
  const FrozenPlan plan = plan_frozen(call, workspace);
  const int64_t row_bytes = call.x.stride * dtype_bytes(call.x.dtype);
  run_team(plan.threads, [&](const Team& team) {
    for (int64_t first = 0; first < call.tokens; first += plan.block) {
      const int64_t count = smaller(plan.block, call.tokens - first);
      for (int64_t from = 0; from < call.in_features; from += plan.depth) {
        const int64_t depth = smaller(plan.depth, call.in_features - from);
        Left rows = plan.rows;
        if (plan.in_place) {  // in one pass: split rows are copies
          rows.data = const_cast<char*>(static_cast<const char*>(call.x.data)) + first * row_bytes;  // only read
          rows.stride = call.x.stride;
        } else {
          copy_rows(team, call.x, first, count, from, depth, rows);
          team.wait();
        }
        frozen_product(team, call, plan, rows, first, count, from, depth);
        if (!plan.in_place) team.wait();  // the next ones overwrite the rows
      }
    }
  });
}

struct FrozenGradientPlan {
  int64_t threads, block, depth, workspace;
  bool few;
  Left rows;
  float* sums;  // [block][in_features], null where one pass gives dx or dx itself is fp32
  Bands bands;
};

inline FrozenGradientPlan plan_frozen_gradient(const FrozenBackward& call, void* base) {
  FrozenGradientPlan plan{};
  Arena arena(base);
  plan.few = call.tokens <= kGradientFew;
  const bool bf16_panels = call.stored == Dtype::bf16 && !plan.few;  // a few rows are fp32 beside any panels
  const LeftKind kind = left_kind(bf16_panels, call.dy.dtype, call.tokens, call.in_features);
  const bool pairs = kind.bf16;
  plan.threads = frozen_threads(call.threads, call.tokens, call.out_features, call.in_features, call.stored);
  plan.block = smaller(call.tokens, kGradientRows);
  plan.depth = smaller(call.out_features, kGradientDepth);
  plan.rows = {kind, nullptr, left_stride(round_up(plan.depth, kPanel), kind)};
  plan.rows.data = arena.take(plan.block * plan.rows.bytes());
  if (plan.depth < call.out_features && call.dx.dtype != Dtype::f32) {
    plan.sums = arena.floats(plan.block * call.in_features);
  }
  BandRoom room{pairs};
  if (!plan.few) room.add(plan.block, call.in_features, piece_count(plan.depth));
  plan.bands = take_bands(
      arena, plan.threads, room,
      plan.few ? 0
               : layout_bytes(pairs, call.in_features, panel_bytes(pairs ? Format::pairs : Format::f32, plan.depth)));
  plan.workspace = arena.used();
  return plan;
}

inline int64_t frozen_backward_workspace(const FrozenBackward& call) {
  return plan_frozen_gradient(call, nullptr).workspace;
}

// tile[r][i] = sum over `panels` panels of row r (fp32, zero beyond the last column) times their rows first + i. Sums
// stay in the lanes of one vector for each i until the end, so that no product waits for a sum across lanes.
template <Format format, int rows>
void multiply_turned(const char* panel, int64_t panels, int64_t k, int64_t first, int64_t width, const Left& left,
                     float* tile) {
  const int64_t bytes = panel_bytes(format, k);
  Vec sums[rows][kPanel];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kPanel; ++i) sums[r][i] = set1(0.0f);
  }
  for (int64_t p = 0; p < panels; ++p, panel += bytes) {
    const float* at[rows];
    for (int r = 0; r < rows; ++r) at[r] = static_cast<const float*>(left.row(r)) + p * kPanel;
    for (int64_t i = 0; i < width; ++i) {
      Vec w[kPanelVecs];
      for (int v = 0; v < kPanelVecs; ++v) {
        w[v] = panel_row<format>(panel, first + i, v * kWidth);
        __builtin_prefetch(panel + panel_bytes(format, first + i) + v * 64 + bytes);
      }
      for (int r = 0; r < rows; ++r) {
        Vec sum = sums[r][i];
        for (int v = 0; v < kPanelVecs; ++v) sum = fma(w[v], load(at[r] + v * kWidth), sum);
        sums[r][i] = sum;
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kPanel; i += kWidth) {
      Vec block[kWidth];
      for (int j = 0; j < kWidth; ++j) block[j] = sums[r][i + j];
      transpose(block);
      for (int j = 1; j < kWidth; ++j) block[0] = add(block[0], block[j]);
      store(tile + r * kPanel + i, block[0]);
    }
  }
}

template <Format format>
inline void multiply_turned(int64_t rows, const char* panel, int64_t panels, int64_t k, int64_t first, int64_t width,
                            const Left& left, float* tile) {
  static_assert(kGradientFew == 4, "a case for each number of rows");
  if (rows == 1) multiply_turned<format, 1>(panel, panels, k, first, width, left, tile);
  if (rows == 2) multiply_turned<format, 2>(panel, panels, k, first, width, left, tile);
  if (rows == 3) multiply_turned<format, 3>(panel, panels, k, first, width, left, tile);
  if (rows == 4) multiply_turned<format, 4>(panel, panels, k, first, width, left, tile);
}

// Adds what out features [out, out + depth) give to the gradients of rows [first, first + count).
inline void frozen_gradient(const Team& team, const FrozenBackward& call, const FrozenGradientPlan& plan, int64_t first,
                            int64_t count, int64_t out, int64_t depth) {
  const int64_t columns = call.in_features;
  const char* panels =
      static_cast<const char*>(call.panels) + out / kPanel * panel_bytes(packed_format(call.stored), columns);
  const Term terms[1] = {
      {plan.rows, {panels, call.stored, 0, Layout::turned_panels, Form::stored, depth, columns, call.stored}}};
  const Gathered dx{call.dx, columns, first, plan.sums, out > 0, out + depth == call.out_features};
  const auto start = [&](int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) {
    if (dx.begun) dx.load(row, rows, column, width, tile);
    return dx.begun;
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) {
    dx.store(row, rows, column, width, tile);
  };
  if (!plan.few) {
    return multiply(team, terms, count, columns, plan.bands.room(team), start, finish);
  }
  const Format format = packed_format(call.stored);
  for (int64_t strip = team.begin(panel_count(columns)); strip < team.end(panel_count(columns)); ++strip) {
    const int64_t column = strip * kPanel, width = smaller(kPanel, columns - column);
    alignas(64) float tile[kGradientFew * kPanel], before[kGradientFew * kPanel];
    if (format == Format::f32) {
      multiply_turned<Format::f32>(count, panels, panel_count(depth), columns, column, width, plan.rows, tile);
    } else if (format == Format::f16) {
      multiply_turned<Format::f16>(count, panels, panel_count(depth), columns, column, width, plan.rows, tile);
    } else {
      multiply_turned<Format::pairs>(count, panels, panel_count(depth), columns, column, width, plan.rows, tile);
    }
    if (start(0, count, column, width, before)) {
      for (int64_t r = 0; r < count; ++r) add_line(tile + r * kPanel, before + r * kPanel, width);
    }
    finish(0, count, column, width, tile);
  }
}

inline void frozen_backward(const FrozenBackward& call, void* workspace) {
  const FrozenGradientPlan plan = plan_frozen_gradient(call, workspace);
  run_team(plan.threads, [&](const Team& team) {
    for (int64_t first = 0; first < call.tokens; first += plan.block) {
      const int64_t count = smaller(plan.block, call.tokens - first);
      for (int64_t out = 0; out < call.out_features; out += plan.depth) {
        const int64_t depth = smaller(plan.depth, call.out_features - out);
        copy_rows(team, call.dy, first, count, out, depth, plan.rows);
        team.wait();
        frozen_gradient(team, call, plan, first, count, out, depth);
        team.wait();  // the next rows take the place of these
      }
    }
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
