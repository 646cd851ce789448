// One position of decoder layers for few rows: two calls for each layer, between which its cache grows, or one call for
// all, into caches that have grown. Products read packed weights; what is small is done by every thread for itself,
// since a barrier costs more than norms of a few rows.
#pragma once

#include "arena.h"
#include "attention.h"
#include "frozen.h"
#include "rms_norm.h"

namespace recmas::cpu::RECMAS_ISA {

inline Term frozen_term(const Left& rows, const FrozenWeight& weight, int64_t k, int64_t columns) {
  return {rows, {weight.panels, weight.stored, k, Layout::panels, Form::packed, k, columns, weight.stored}};
}

// rows W^T + b; finish(row, rows, column, columns, tile) consumes the tiles of this thread's columns.
template <class Finish>
void multiply_frozen(const Team& team, const Left& left, const FrozenWeight& weight, int64_t rows, int64_t k,
                     int64_t columns, const Finish& finish) {
  const Term terms[1] = {frozen_term(left, weight, k, columns)};
  const auto start = [&](int64_t, int64_t tile_rows, int64_t column, int64_t width, float* tile) {
    if (weight.bias.data == nullptr) return false;
    load_tile(weight.bias.data, weight.bias.dtype, 0, 0, tile_rows, column, width, tile);
    return true;
  };
  multiply_whole(team, terms, rows, columns, nullptr, start, finish);
}

// to[0, columns) = norm of from[0, columns) of any type.
template <class Result>
inline void norm_row(const void* from, Dtype dtype, const RmsGain& norm, int64_t columns, Result to) {
  typed(norm.gain.data, norm.gain.dtype, [&](const auto* gain) {
    typed(from, dtype, [&](const auto* x) { rms_norm_row(x, gain, columns, norm.offset, norm.eps, to); });
  });
}

// The same as a row that products read.
inline void norm_row(const void* from, Dtype dtype, const RmsGain& norm, int64_t columns, const Left& to, int64_t r) {
  write_row(to, r, [&](auto row) { norm_row(from, dtype, norm, columns, row); });
  pad_left(to, r, columns);
}

// How rows are read that all of `weights` multiply; columns: of the first.
template <int count>
inline LeftKind left_kind(const FrozenWeight* const (&weights)[count], Dtype dtype, int64_t rows, int64_t columns) {
  bool bf16 = true;
  for (const FrozenWeight* weight : weights) bf16 = bf16 && weight->stored == Dtype::bf16;
  return left_kind(bf16, dtype, rows, columns);
}

inline const void* row_of(const MatrixView& view, int64_t row) {
  return static_cast<const char*>(view.data) + row * view.stride * dtype_bytes(view.dtype);
}

// Thread `rank`'s own of as many equal pieces.
inline Left own(const Left& all, int64_t rank, int64_t rows) {
  Left piece = all;
  piece.data = all.row(rank * rows);
  return piece;
}

inline int64_t useful_threads(const LayerInputs& call) {
  const int64_t columns = (call.heads + 2 * call.key_heads) * call.head_features;
  return frozen_threads(call.threads, call.rows, call.features, columns, call.query.stored);
}

inline int64_t useful_threads(const LayerOutput& call) {
  const int64_t columns = call.heads * call.head_features + 3 * call.hidden_features;
  return frozen_threads(call.threads, call.rows, call.features, columns, call.gate.stored);
}

struct InputsPlan {
  int64_t columns, workspace;
  Left normed;   // of each thread
  float* heads;  // [rows][columns]: queries, keys, values
};

inline InputsPlan plan_inputs(const LayerInputs& call, int64_t threads, void* base) {
  InputsPlan plan{};
  Arena arena(base);
  plan.columns = (call.heads + 2 * call.key_heads) * call.head_features;
  const LeftKind kind =
      left_kind({&call.query, &call.key, &call.value}, call.x.dtype, call.rows, call.heads * call.head_features);
  plan.normed = take_left(arena, threads * call.rows, call.features, kind);
  plan.heads = arena.floats(call.rows * plan.columns);
  plan.workspace = arena.used();
  return plan;
}

inline int64_t layer_inputs_workspace(const LayerInputs& call) {
  return plan_inputs(call, useful_threads(call), nullptr).workspace;
}

// to = scale * turn(head): each feature of the first half with its partner in the second.
template <class Angle, class Result>
void turn_head(const float* head, const Angle* cos, const Angle* sin, int64_t half, float scale, Result* to) {
  each_vector(half, [&](int64_t c, auto lanes) {
    const Vec a = load(head + c, lanes), b = load(head + half + c, lanes);
    const Vec low = sub(mul(a, load(cos + c, lanes)), mul(b, load(sin + c, lanes)));
    const Vec high = fma(b, load(cos + half + c, lanes), mul(a, load(sin + half + c, lanes)));
    store(to + c, mul(low, set1(scale)), lanes);
    store(to + half + c, mul(high, set1(scale)), lanes);
  });
}

// Norms and turns one head of `line` into its place.
inline void finish_head(const LayerInputs& call, float* line, const RmsGain& norm, int64_t row, float scale, void* to,
                        Dtype dtype) {
  if (norm.gain.data != nullptr) norm_row(line, Dtype::f32, norm, call.head_features, line);
  typed(row_of(call.cos, row), call.cos.dtype, [&](const auto* cos) {
    const decltype(cos) sin = static_cast<decltype(cos)>(row_of(call.sin, row));
    typed(to, dtype, [&](auto* result) { turn_head(line, cos, sin, call.head_features / 2, scale, result); });
  });
}

inline void* head_of(const HeadRows& rows, int64_t row, int64_t head) {
  return static_cast<char*>(rows.data) + (row * rows.row_stride + head * rows.head_stride) * dtype_bytes(rows.dtype);
}

// This thread's part; the results stand after the next barrier.
inline void layer_inputs(const Team& team, const LayerInputs& call, const InputsPlan& plan) {
  const int64_t width = call.head_features, queries = call.heads * width, keys = call.key_heads * width;
  const Left normed = own(plan.normed, team.rank, call.rows);
  for (int64_t r = 0; r < call.rows; ++r) {
    norm_row(row_of(call.x, r), call.x.dtype, call.norm, call.features, normed, r);
  }
  const auto to_heads = [&](int64_t first) {
    return [&plan, first](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
      store_tile(plan.heads + first, Dtype::f32, plan.columns, row, rows, column, columns, tile);
    };
  };
  multiply_frozen(team, normed, call.query, call.rows, call.features, queries, to_heads(0));
  // An odd number of panels gives the last thread one more each time; keys begin with the other end.
  Team reversed = team;
  reversed.rank = team.size - 1 - team.rank;
  multiply_frozen(reversed, normed, call.key, call.rows, call.features, keys, to_heads(queries));
  multiply_frozen(team, normed, call.value, call.rows, call.features, keys, to_heads(queries + keys));
  team.wait();
  const int64_t heads = call.heads + 2 * call.key_heads;
  for (int64_t item = team.begin(call.rows * heads); item < team.end(call.rows * heads); ++item) {
    const int64_t row = item / heads, head = item % heads, key = head - call.heads, value = key - call.key_heads;
    float* const line = plan.heads + row * plan.columns + head * width;
    if (key < 0) {
      float* const to = call.queries + row * queries + head * width;
      finish_head(call, line, call.query_norm, row, call.scale, to, Dtype::f32);
    } else if (value < 0) {
      finish_head(call, line, call.key_norm, row, 1.0f, head_of(call.keys, row, key), call.keys.dtype);
    } else {
      store_line(head_of(call.values, row, value), call.values.dtype, 0, width, line);
    }
  }
}

inline void layer_inputs(const LayerInputs& call, void* workspace) {
  const int64_t threads = useful_threads(call);
  const InputsPlan plan = plan_inputs(call, threads, workspace);
  run_team(threads, [&](const Team& team) { layer_inputs(team, call, plan); });
}

struct OutputPlan {
  int64_t workspace;
  Left attended;  // [rows][heads * head_features]
  Left hidden;    // [rows][hidden_features]
  float* summed;  // [rows][features]: what attention adds, then what the feed-forward part adds
  float* gated;   // [rows][hidden_features]: act(gate)
  // Of each thread:
  int64_t line_floats;
  float* lines;   // of line_floats: what some heads attend to, and what that takes
  float* middle;  // [rows][features]
  Left normed;    // [rows][features]
};

// Heads that are attended to side by side.
inline int64_t heads_together(const LayerOutput& call) { return smaller(call.heads / call.key_heads, kHeads); }

inline OutputPlan plan_output(const LayerOutput& call, int64_t threads, void* base) {
  OutputPlan plan{};
  Arena arena(base);
  const int64_t inner = call.heads * call.head_features;
  const Dtype dtype = call.x.dtype;
  plan.attended = take_left(arena, call.rows, inner, left_kind({&call.out}, dtype, call.rows, call.features));
  plan.hidden =
      take_left(arena, call.rows, call.hidden_features, left_kind({&call.down}, dtype, call.rows, call.features));
  plan.summed = arena.floats(call.rows * call.features);
  plan.gated = arena.floats(call.rows * call.hidden_features);
  plan.line_floats = heads_together(call) * (call.head_features + attention_floats(call.positions, call.head_features));
  plan.lines = arena.floats(threads * plan.line_floats);
  plan.middle = arena.floats(threads * call.rows * call.features);
  plan.normed = take_left(arena, threads * call.rows, call.features,
                          left_kind({&call.gate, &call.up}, dtype, call.rows, call.hidden_features));
  plan.workspace = arena.used();
  return plan;
}

inline int64_t layer_output_workspace(const LayerOutput& call) {
  return plan_output(call, useful_threads(call), nullptr).workspace;
}

inline Vec activate(Vec x, Activation kind) {
  if (kind != Activation::silu) return gelu(x, kind == Activation::gelu_tanh ? Gelu::tanh : Gelu::erf);
  const Vec power = mul(x, set1(-1.44269504f)), most = set1(126.0f);  // -log2(e)
  // Beyond +-126 the logistic is 0 or 1 to the last bit.
  const Vec e = exp2(max(set1(-126.0f), min(most, power)));
  const Vec logistic = select_greater(power, most, set1(0.0f), div(set1(1.0f), add(set1(1.0f), e)));
  return mul(x, logistic);
}

// Attention of this thread's rows and heads.
inline void attend_heads(const Team& team, const LayerOutput& call, const OutputPlan& plan) {
  const int64_t width = call.head_features, shared = call.heads / call.key_heads;
  const int64_t end = team.end(call.rows * call.heads);
  float* const out = plan.lines + team.rank * plan.line_floats;
  int64_t item = team.begin(call.rows * call.heads);
  CacheAhead ahead(call.keys, call.values, call.key_heads, width, call.positions, item / shared,
                   (end + shared - 1) / shared);
  while (item < end) {
    const int64_t row = item / call.heads, head = item % call.heads, key_head = head / shared;
    const int64_t left = smaller((item / shared + 1) * shared, end) - item, heads = smaller(left, kHeads);
    const uint8_t* const mask = call.mask == nullptr ? nullptr : call.mask + row * call.mask_stride;
    typed(call.keys.data, call.keys.dtype, [&](const auto* keys) {
      const decltype(keys) values = static_cast<decltype(keys)>(call.values.data);
      attend(call.queries + item * width, heads, keys + row * call.keys.row_stride + key_head * call.keys.head_stride,
             call.keys.position_stride, values + row * call.values.row_stride + key_head * call.values.head_stride,
             call.values.position_stride, width, call.positions, mask, ahead, out + heads_together(call) * width, out);
    });
    store_left(plan.attended, row, head * width, heads * width, out);
    if (head + heads == call.heads) pad_left(plan.attended, row, call.heads * width);
    item += heads;
  }
}

// middle = x + norm_1(summed), and normed = norm_2(middle).
inline void finish_attention(const LayerOutput& call, const OutputPlan& plan, float* middle, const Left& normed) {
  for (int64_t r = 0; r < call.rows; ++r) {
    float* const line = middle + r * call.features;
    const float* added = plan.summed + r * call.features;
    if (call.after_attention.gain.data != nullptr) {
      norm_row(added, Dtype::f32, call.after_attention, call.features, line);
      added = line;
    }
    typed(row_of(call.x, r), call.x.dtype, [&](const auto* x) {
      each_vector(call.features, [&](int64_t c, auto lanes) {
        store(line + c, add(load(x + c, lanes), load(added + c, lanes)), lanes);
      });
    });
    norm_row(line, Dtype::f32, call.before_feed, call.features, normed, r);
  }
}

// hidden = act(normed Wg^T + bg) * (normed Wu^T + bu): both products give a thread the same tiles.
inline void feed(const Team& team, const LayerOutput& call, const OutputPlan& plan, const Left& normed) {
  const int64_t columns = call.hidden_features;
  multiply_frozen(team, normed, call.gate, call.rows, call.features, columns,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) {
                    for (int64_t i = 0; i < rows * kPanel; i += kWidth) {
                      store(tile + i, activate(load(tile + i), call.activation));
                    }
                    store_tile(plan.gated, Dtype::f32, columns, row, rows, column, width, tile);
                  });
  multiply_frozen(team, normed, call.up, call.rows, call.features, columns,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) {
                    for (int64_t r = 0; r < rows; ++r) {
                      const float* const gated = plan.gated + (row + r) * columns + column;
                      float* const line = tile + r * kPanel;
                      each_vector(width, [&](int64_t c, auto lanes) {
                        store(line + c, mul(load(gated + c, lanes), load(line + c, lanes)), lanes);
                      });
                      if (column + width == columns) pad_left(plan.hidden, row + r, columns);
                    }
                    store_tile(plan.hidden, row, rows, column, width, tile);
                  });
}

// This thread's part; the results stand after the next barrier. Nobody reads x when y is written.
inline void layer_output(const Team& team, const LayerOutput& call, const OutputPlan& plan) {
  const int64_t features = call.features;
  attend_heads(team, call, plan);
  team.wait();
  const auto keep_sums = [&](int64_t row, int64_t rows, int64_t column, int64_t width, const float* tile) {
    store_tile(plan.summed, Dtype::f32, features, row, rows, column, width, tile);
  };
  multiply_frozen(team, plan.attended, call.out, call.rows, call.heads * call.head_features, features, keep_sums);
  team.wait();
  float* const middle = plan.middle + team.rank * call.rows * features;
  const Left normed = own(plan.normed, team.rank, call.rows);
  finish_attention(call, plan, middle, normed);
  feed(team, call, plan, normed);
  team.wait();  // for hidden; and everyone has read x and what attention summed
  if (call.after_feed.gain.data == nullptr) {
    multiply_frozen(team, plan.hidden, call.down, call.rows, call.hidden_features, features,
                    [&](int64_t row, int64_t rows, int64_t column, int64_t width, float* tile) {
                      for (int64_t r = 0; r < rows; ++r) {
                        add_line(tile + r * kPanel, middle + (row + r) * features + column, width);
                      }
                      store_tile(call.y.data, call.y.dtype, features, row, rows, column, width, tile);
                    });
    return;
  }
  multiply_frozen(team, plan.hidden, call.down, call.rows, call.hidden_features, features, keep_sums);
  team.wait();
  for (int64_t r = team.begin(call.rows); r < team.end(call.rows); ++r) {
    float *const line = middle + r * features, *const added = plan.summed + r * features;
    norm_row(added, Dtype::f32, call.after_feed, features, added);
    add_line(line, added, features);
    store_line(call.y.data, call.y.dtype, r * features, features, line);
  }
}

inline void layer_output(const LayerOutput& call, void* workspace) {
  const int64_t threads = useful_threads(call);
  const OutputPlan plan = plan_output(call, threads, workspace);
  run_team(threads, [&](const Team& team) { layer_output(team, call, plan); });
}

inline int64_t useful_threads(const DecoderLayer* layers, int64_t count) {
  int64_t most = 1;
  for (int64_t i = 0; i < count; ++i) most = larger(most, useful_threads(layers[i].output));
  return most;
}

inline int64_t decoder_layers_workspace(const DecoderLayer* layers, int64_t count) {
  const int64_t threads = useful_threads(layers, count);
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    most = larger(most, plan_inputs(layers[i].inputs, threads, nullptr).workspace);
    most = larger(most, plan_output(layers[i].output, threads, nullptr).workspace);
  }
  return most;
}

// One after the other in the same workspace: whoever passes a barrier has read what was there before it.
inline void decoder_layers(const DecoderLayer* layers, int64_t count, void* workspace) {
  const int64_t threads = useful_threads(layers, count);
  run_team(threads, [&](const Team& team) {
    for (int64_t i = 0; i < count; ++i) {
      const auto& [inputs, output] = layers[i];
      layer_inputs(team, inputs, plan_inputs(inputs, threads, workspace));
      team.wait();
      layer_output(team, output, plan_output(output, threads, workspace));
      team.wait();
    }
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
