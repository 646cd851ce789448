// The link, backward, in blocks of tokens; within a block the phases below, a barrier after each. Products whose
// result is [features, features] read the transposed activations of the whole block.
//     rows      dz = gradient of norm_out at z (or dy); u = norm_in(x)
//     products  dp = (dz W2) gelu'(p), and a = gelu(p)
//     products  dW2 += dz^T a   dW3 += dz^T x   dW1 += dp^T u   du = dp W1   and dz W3
//     rows      dx = gradient of norm_in at du + residual
#pragma once

#include "link_forward.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kBackwardBlock = 1024;  // tokens: every weight gradient is read and written once per block

// A gradient summed over blocks in fp32: the output itself where that is fp32, else a piece of the workspace; null
// where nothing is wanted, or where a single block writes its result into the output at once.
struct Sum {
  Output output;
  float* values;
};

inline Sum take_sum(Arena& arena, const Output& output, int64_t count) {
  if (output.data == nullptr) return {output, nullptr};
  if (output.dtype == Dtype::f32) return {output, static_cast<float*>(output.data)};
  return {output, arena.floats(count)};
}

// The gradient of a weight, a product of two transposed matrices.
struct WeightSum {
  Sum sum;
  bool by_library;  // which transposes while it multiplies

  bool reads_transposed() const { return sum.output.data != nullptr && !by_library; }
};

struct BackwardPlan {
  int64_t threads, block, workspace;
  Vectors vectors;
  bool norm_in, norm_out, identity, linear;
  bool needs_dp;           // a gradient before the activation is wanted
  bool needs_du;           // a gradient before W1 is wanted
  Left dz, dz_transposed;  // [block][out], [out][block]
  Left dp, dp_transposed;  // [block][hidden], [hidden][block]
  Left u, activation;      // [block][in], [block][hidden]
  float *du, *residual;    // [block][in]: gradient at u, and dz W3 where an input norm keeps the two apart
  WeightSum w1, w2, w3;
  Sum b1, b2, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias;
  Output b3;
  float* sums;         // of products in bands
  int64_t sum_floats;  // each thread's
  Sgemm* sgemm;
  char* scratch;
  int64_t scratch_each;  // panels being packed, then three lines
  int64_t panel_scratch, line_floats;

  char* panels(const Team& team) const { return scratch + team.rank * scratch_each; }
  float* line(const Team& team) const { return reinterpret_cast<float*>(panels(team) + panel_scratch); }
  Room room(const Team& team) const { return {panels(team), sums + team.rank * sum_floats, sgemm}; }
  float* second_line(const Team& team) const { return line(team) + line_floats; }
  float* third_line(const Team& team) const { return line(team) + 2 * line_floats; }
};

// right: what the product reads, [tokens][columns].
inline WeightSum take_weight_sum(Arena& arena, const BackwardPlan& plan, const Output& output, int64_t rows,
                                 int64_t columns, const Matrix& right, bool several_blocks) {
  const bool by_library = plan.sgemm != nullptr && library_reads(right.dtype, right.stride, columns) &&
                          output.dtype == Dtype::f32 && library_multiplies(rows, columns, plan.block);
  if (by_library) return {{output, static_cast<float*>(output.data)}, true};
  return {several_blocks ? take_sum(arena, output, rows * columns) : Sum{output, nullptr}, false};
}

inline BackwardPlan plan_backward(const LinkBackward& call, void* base) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  Arena arena(base);
  BackwardPlan plan{};
  plan.sgemm = library_of(config);
  plan.threads = useful_threads(config.threads, 2.0 * link_flops(s, config.residual));
  plan.block = smaller(s.tokens, kBackwardBlock);
  plan.vectors = plan_vectors(arena, call.weights, s);
  plan.norm_in = call.weights.norm_in_weight.data != nullptr;
  plan.norm_out = call.weights.norm_out_weight.data != nullptr;
  plan.identity = config.residual == Residual::identity;
  plan.linear = config.residual == Residual::linear;
  plan.needs_du = call.dx.data != nullptr || call.dnorm_in_weight.data != nullptr || call.dnorm_in_bias.data != nullptr;
  plan.needs_dp = plan.needs_du || call.dw1.data != nullptr || call.db1.data != nullptr;
  const bool dot = kDotPairs && config.compute == Dtype::bf16;
  plan.dz = take_left(arena, plan.block, s.out_features, {dot});
  const bool several_blocks = s.tokens > plan.block;
  const Matrix x{nullptr, call.x.dtype, call.x.stride};
  const Matrix u{nullptr, plan.dz.dtype(), left_stride(s.in_features, {dot})};
  const Matrix activation{nullptr, plan.dz.dtype(), left_stride(s.hidden_features, {dot})};
  const Matrix& inputs = plan.norm_in ? u : x;
  plan.w1 = take_weight_sum(arena, plan, call.dw1, s.hidden_features, s.in_features, inputs, several_blocks);
  plan.w2 = take_weight_sum(arena, plan, call.dw2, s.out_features, s.hidden_features, activation, several_blocks);
  plan.w3 = take_weight_sum(arena, plan, call.dw3, s.out_features, s.in_features, x, several_blocks);
  if (plan.w2.reads_transposed() || plan.w3.reads_transposed()) {
    plan.dz_transposed = take_left(arena, s.out_features, plan.block, {dot});
  }
  if (plan.needs_dp) plan.dp = take_left(arena, plan.block, s.hidden_features, {dot});
  if (plan.w1.reads_transposed()) plan.dp_transposed = take_left(arena, s.hidden_features, plan.block, {dot});
  if (call.dw1.data != nullptr && plan.norm_in) plan.u = take_left(arena, plan.block, s.in_features, {dot});
  if (call.dw2.data != nullptr) plan.activation = take_left(arena, plan.block, s.hidden_features, {dot});
  if (plan.needs_du && plan.norm_in) {
    plan.du = arena.floats(plan.block * s.in_features);
    if (plan.linear && call.dx.data != nullptr) plan.residual = arena.floats(plan.block * s.in_features);
  }
  plan.b1 = take_sum(arena, call.db1, s.hidden_features);
  const bool shared_bias = call.db2.data == nullptr && call.db3.data != nullptr;  // db3 = db2
  plan.b2 = take_sum(arena, shared_bias ? call.db3 : call.db2, s.out_features);
  plan.b3 = shared_bias ? Output{nullptr, Dtype::f32} : call.db3;
  plan.norm_in_weight = take_sum(arena, call.dnorm_in_weight, s.in_features);
  plan.norm_in_bias = take_sum(arena, call.dnorm_in_bias, s.in_features);
  plan.norm_out_weight = take_sum(arena, call.dnorm_out_weight, s.out_features);
  plan.norm_out_bias = take_sum(arena, call.dnorm_out_bias, s.out_features);
  const Format fresh = dot ? Format::pairs : Format::f32;
  const int64_t deepest = larger(s.out_features + s.hidden_features, plan.block);
  plan.panel_scratch = larger(panel_bytes(fresh, deepest) + panel_bytes(fresh, 2), kResidentBytes);
  BandRoom bands{dot};
  bands.add(plan.block, s.hidden_features, piece_count(s.out_features));
  bands.add(plan.block, s.in_features,
            piece_count(s.hidden_features) + (plan.linear ? piece_count(s.out_features) : 0));
  if (call.dw1.data != nullptr) bands.add(s.hidden_features, s.in_features, piece_count(plan.block));
  if (call.dw2.data != nullptr) bands.add(s.out_features, s.hidden_features, piece_count(plan.block));
  if (call.dw3.data != nullptr) bands.add(s.out_features, s.in_features, piece_count(plan.block));
  plan.panel_scratch = larger(plan.panel_scratch, bands.scratch);
  LibraryRoom library{plan.sgemm, plan.threads};
  library.add(plan.block, s.hidden_features);
  library.add(plan.block, s.in_features);
  // Gradients that the library does not write in place.
  if (plan.w1.reads_transposed()) library.add(s.hidden_features, s.in_features);
  if (plan.w2.reads_transposed()) library.add(s.out_features, s.hidden_features);
  if (plan.w3.reads_transposed()) library.add(s.out_features, s.in_features);
  plan.panel_scratch = larger(plan.panel_scratch, library.bytes);
  plan.sum_floats = bands.sums;
  plan.sums = arena.floats(plan.threads * plan.sum_floats);
  plan.line_floats = round_up(larger(larger(s.in_features, s.out_features), s.hidden_features), 16);
  plan.scratch_each = plan.panel_scratch + 3 * plan.line_floats * 4;
  plan.scratch = arena.take(plan.threads * plan.scratch_each);
  plan.workspace = arena.used();
  return plan;
}

struct BackwardBlock {
  int64_t first, tokens;
  bool accumulate;  // not the first block
};

inline RowStatistics saved_statistics(const LinkBackward& call, int64_t token, bool out) {
  const float* mean = call.stats + (out ? 2 : 0) * call.config.shape.tokens + token;
  return {mean[0], mean[call.config.shape.tokens]};
}

inline Matrix rows_from(const MatrixView& view, int64_t first) {
  const char* data = static_cast<const char*>(view.data);
  if (data != nullptr) data += first * view.stride * dtype_bytes(view.dtype);
  return {data, view.dtype, view.stride};
}

inline void backward_rows(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                          const BackwardBlock& block) {
  const LinkShape& s = call.config.shape;
  const Matrix dy = rows_from(call.dy, block.first), z = rows_from(call.z, block.first),
               x = rows_from(call.x, block.first);
  float *line = plan.line(team), *other = plan.second_line(team);
  for (int64_t r = team.begin(block.tokens); r < team.end(block.tokens); ++r) {
    dy.line(r, 0, s.out_features, line);
    if (plan.norm_out) {
      z.line(r, 0, s.out_features, other);
      norm_backward_line(line, other, s.out_features, saved_statistics(call, block.first + r, true),
                         plan.vectors.norm_out_weight);
    }
    store_left(plan.dz, r, 0, s.out_features, line);
    pad_left(plan.dz, r, s.out_features);
    if (plan.u.data == nullptr) continue;
    x.line(r, 0, s.in_features, line);
    norm_line(line, s.in_features, saved_statistics(call, block.first + r, false), plan.vectors.norm_in_weight,
              plan.vectors.norm_in_bias);
    store_left(plan.u, r, 0, s.in_features, line);
  }
}

// Sums over tokens of a gradient and, for a norm's gain, of the gradient times the normalised rows.
inline void sum_gradient(const Team& team, const BackwardPlan& plan, const BackwardBlock& block, const Matrix& gradient,
                         int64_t columns, float* sums) {
  if (sums == nullptr) return;
  sum_columns(team, block.tokens, columns, sums, block.accumulate, plan.line(team),
              [&](int64_t r, int64_t c, int64_t width, float* line) { gradient.line(r, c, width, line); });
}
inline void sum_gain_gradient(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                              const BackwardBlock& block, const Matrix& gradient, const Matrix& rows, bool out,
                              int64_t columns, float* sums) {
  if (sums == nullptr) return;
  float* other = plan.third_line(team);  // sum_columns uses the first two
  sum_columns(team, block.tokens, columns, sums, block.accumulate, plan.line(team),
              [&](int64_t r, int64_t c, int64_t width, float* line) {
                const RowStatistics row = saved_statistics(call, block.first + r, out);
                gradient.line(r, c, width, line);
                rows.line(r, c, width, other);
                each_vector(width, [&](int64_t i, auto lanes) {
                  store(line + i, mul(load(line + i, lanes), normalised(load(other + i, lanes), row)), lanes);
                });
              });
}

// to [columns][rows] = from [rows][columns] transposed, both fp32 or both bf16; each thread takes rows of `to`.
inline void transpose_left(const Team& team, const Left& from, int64_t rows, int64_t columns, const Left& to) {
  const int64_t bands = (columns + kWidth - 1) / kWidth;
  typed(from.data, from.dtype(), [&](auto* source) {
    auto* target = static_cast<decltype(source)>(to.data);
    for (int64_t band = team.begin(bands); band < team.end(bands); ++band) {
      const int64_t c = band * kWidth, width = smaller(kWidth, columns - c);
      for (int64_t r = 0; r < to.stride; r += kWidth) {
        Vec block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          block[i] = r + i < rows ? load(source + (r + i) * from.stride + c) : set1(0.0f);  // rows are padded
        }
        transpose(block);
        for (int64_t i = 0; i < width; ++i) store(target + (c + i) * to.stride + r, block[i]);
      }
    }
  });
}

inline void backward_out_sums(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                              const BackwardBlock& block) {
  const int64_t columns = call.config.shape.out_features;
  const Matrix dy = rows_from(call.dy, block.first), z = rows_from(call.z, block.first);
  if (plan.dz_transposed.data != nullptr) transpose_left(team, plan.dz, block.tokens, columns, plan.dz_transposed);
  sum_gradient(team, plan, block, as_matrix(plan.dz), columns, plan.b2.values);
  sum_gradient(team, plan, block, dy, columns, plan.norm_out_bias.values);
  sum_gain_gradient(team, call, plan, block, dy, z, true, columns, plan.norm_out_weight.values);
}

inline void backward_hidden(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                            const BackwardBlock& block) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const Matrix pre = rows_from(call.pre, block.first);
  const bool keep = plan.activation.data != nullptr;
  if (!plan.needs_dp) {
    float* line = plan.line(team);
    for (int64_t r = team.begin(block.tokens); keep && r < team.end(block.tokens); ++r) {
      pre.line(r, 0, s.hidden_features, line);
      each_vector(s.hidden_features,
                  [&](int64_t c, auto lanes) { store(line + c, gelu(load(line + c, lanes), config.gelu), lanes); });
      store_left(plan.activation, r, 0, s.hidden_features, line);
    }
    return;
  }
  const Term terms[1] = {
      {plan.dz, weight_of(call.weights.w2, s.out_features, s.hidden_features, false, config.compute)}};
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    alignas(64) float activations[kTallRows * kPanel];
    load_tile(call.pre.data, call.pre.dtype, call.pre.stride, block.first + row, rows, column, columns, activations);
    for (int64_t r = 0; r < rows; ++r) {
      float *gradient = tile + r * kPanel, *line = activations + r * kPanel;
      each_vector(columns, [&](int64_t c, auto) {
        Vec activation;
        const Vec slope = gelu_gradient(load(line + c), config.gelu, &activation);
        store(gradient + c, mul(load(gradient + c), slope));
        store(line + c, activation);
      });
    }
    store_tile(plan.dp, row, rows, column, columns, tile);
    if (keep) store_tile(plan.activation, row, rows, column, columns, activations);
    for (int64_t r = row; column + columns == s.hidden_features && r < row + rows; ++r) {
      pad_left(plan.dp, r, s.hidden_features);
    }
  };
  multiply(team, terms, block.tokens, s.hidden_features, plan.room(team), start_fresh, finish);
}

// From here on a finished gradient is written past the caches, which would read each line before it is written, and not
// keep it for the optimizer.
constexpr int64_t kPastCaches = 8 << 20;  // bytes

inline bool past_caches(const Output& output, int64_t rows, int64_t columns) {
  return output.dtype == Dtype::f32 && rows * columns * 4 >= kPastCaches && columns % kWidth == 0 &&
         reinterpret_cast<uintptr_t>(output.data) % (kWidth * sizeof(float)) == 0;
}

// sum [rows][columns] (+)= left [tokens][rows] transposed x right [tokens][columns], rounded to the output after the
// last block.
inline void add_weight_gradient(const Team& team, const BackwardPlan& plan, const WeightSum& weight, const Left& left,
                                const Left& left_transposed, const Matrix& right, int64_t rows, int64_t columns,
                                const BackwardBlock& block, Dtype compute, bool last) {
  const Sum& gradient = weight.sum;
  if (gradient.output.data == nullptr) return;
  const Term terms[1] = {
      {left_transposed,
       {right.data, right.dtype, right.stride, Layout::rows, Form::stored, block.tokens, columns, compute}}};
  if (weight.by_library) {
    add_by_library(team, plan.sgemm, left, terms[0].right, rows, columns, block.accumulate, gradient.values);
    return;
  }
  const bool resident = all_panels_bytes(terms[0]) <= kResidentBytes;
  char* result = static_cast<char*>(last ? gradient.output.data : gradient.values);
  const int64_t element_bytes = last ? dtype_bytes(gradient.output.dtype) : 4;
  const bool past = last && past_caches(gradient.output, rows, columns);
  // A short product is bound by writing its result: the lines of tiles to come are asked for early.
  const int64_t ahead =
      resident ? 4 * kPanel : 2 * (in_registers(left_transposed, rows) ? kTallRows : kTileRows) * columns;
  const auto start = [&](int64_t row, int64_t count, int64_t column, int64_t width, float* tile) {
    for (int64_t r = 0; r < count && !past; ++r) {
      const char* line = result + ((row + r) * columns + column + ahead) * element_bytes;
      for (int64_t byte = 0; byte < kPanel * element_bytes; byte += 64) __builtin_prefetch(line + byte, 1);
    }
    if (block.accumulate) load_tile(gradient.values, Dtype::f32, columns, row, count, column, width, tile);
    return block.accumulate;
  };
  const auto finish = [&](int64_t row, int64_t count, int64_t column, int64_t width, float* tile) {
    for (int64_t r = 0; r < count && past; ++r) {
      float* line = reinterpret_cast<float*>(result) + (row + r) * columns + column;
      for (int64_t c = 0; c < width; c += kWidth) store_past_caches(line + c, load(tile + r * kPanel + c));
    }
    if (past) return;
    store_tile(result, last ? gradient.output.dtype : Dtype::f32, columns, row, count, column, width, tile);
  };
  if (resident) {
    multiply_resident(team, terms[0], rows, columns, plan.panels(team), start, finish);
  } else {
    multiply(team, terms, rows, columns, plan.room(team), start, finish);
  }
  if (past) fence_stores();
}

inline void backward_in(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                        const BackwardBlock& block) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const Term hidden{plan.dp, weight_of(call.weights.w1, s.hidden_features, s.in_features, false, config.compute)};
  const Term residual{plan.dz, weight_of(call.weights.w3, s.out_features, s.in_features, false, config.compute)};
  if (plan.norm_in) {
    const auto keep = [&](float* out) {
      return [&s, out](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
        store_tile(out, Dtype::f32, s.in_features, row, rows, column, columns, tile);
      };
    };
    const Term first[1] = {hidden}, second[1] = {residual};
    multiply(team, first, block.tokens, s.in_features, plan.room(team), start_fresh, keep(plan.du));
    if (plan.residual != nullptr) {
      multiply(team, second, block.tokens, s.in_features, plan.room(team), start_fresh, keep(plan.residual));
    }
    return;
  }
  const auto start = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    if (plan.identity) {
      load_tile(plan.dz.data, plan.dz.dtype(), plan.dz.stride, row, rows, column, columns, tile);
    }
    return plan.identity;
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    store_tile(call.dx.data, call.dx.dtype, s.in_features, block.first + row, rows, column, columns, tile);
  };
  if (plan.linear) {
    const Term terms[2] = {hidden, residual};
    multiply(team, terms, block.tokens, s.in_features, plan.room(team), start, finish);
  } else {
    const Term terms[1] = {hidden};
    multiply(team, terms, block.tokens, s.in_features, plan.room(team), start, finish);
  }
}

inline void backward_norm_in(const Team& team, const LinkBackward& call, const BackwardPlan& plan,
                             const BackwardBlock& block) {
  const int64_t columns = call.config.shape.in_features;
  const Matrix x = rows_from(call.x, block.first), du{plan.du, Dtype::f32, columns};
  sum_gradient(team, plan, block, du, columns, plan.norm_in_bias.values);
  sum_gain_gradient(team, call, plan, block, du, x, false, columns, plan.norm_in_weight.values);
  if (call.dx.data == nullptr) return;
  float *line = plan.line(team), *other = plan.second_line(team);
  for (int64_t r = team.begin(block.tokens); r < team.end(block.tokens); ++r) {
    du.line(r, 0, columns, line);
    x.line(r, 0, columns, other);
    norm_backward_line(line, other, columns, saved_statistics(call, block.first + r, false),
                       plan.vectors.norm_in_weight);
    if (plan.identity) {
      load_left(plan.dz, r, 0, columns, other);
      add_line(line, other, columns);
    }
    if (plan.residual != nullptr) add_line(line, plan.residual + r * columns, columns);
    store_line(call.dx.data, call.dx.dtype, (block.first + r) * columns, columns, line);
  }
}

// Writes a finished sum to an output that is not the sum itself.
inline void write_sum(const float* values, const Output& output, int64_t count) {
  if (output.data != nullptr && output.data != values) store_line(output.data, output.dtype, 0, count, values);
}

inline int64_t link_backward_workspace(const LinkBackward& call) { return plan_backward(call, nullptr).workspace; }

inline void link_backward(const LinkBackward& call, void* workspace) {
  const BackwardPlan plan = plan_backward(call, workspace);
  const LinkShape& s = call.config.shape;
  const Dtype compute = call.config.compute;
  run_team(plan.threads, [&](const Team& team) {
    widen_vectors(team, call.weights, s, plan.vectors);
    for (int64_t first = 0; first < s.tokens; first += plan.block) {
      const BackwardBlock block{first, smaller(plan.block, s.tokens - first), first > 0};
      const bool last = first + block.tokens == s.tokens;
      const Matrix x = rows_from(call.x, first);
      backward_rows(team, call, plan, block);
      team.wait();
      backward_out_sums(team, call, plan, block);
      backward_hidden(team, call, plan, block);
      team.wait();
      if (plan.dp_transposed.data != nullptr) {
        transpose_left(team, plan.dp, block.tokens, s.hidden_features, plan.dp_transposed);
      }
      sum_gradient(team, plan, block, as_matrix(plan.dp), s.hidden_features, plan.b1.values);
      add_weight_gradient(team, plan, plan.w2, plan.dz, plan.dz_transposed, as_matrix(plan.activation), s.out_features,
                          s.hidden_features, block, compute, last);
      add_weight_gradient(team, plan, plan.w3, plan.dz, plan.dz_transposed, x, s.out_features, s.in_features, block,
                          compute, last);
      if (plan.needs_du) backward_in(team, call, plan, block);
      team.wait();
      add_weight_gradient(team, plan, plan.w1, plan.dp, plan.dp_transposed, plan.norm_in ? as_matrix(plan.u) : x,
                          s.hidden_features, s.in_features, block, compute, last);
      if (plan.needs_du && plan.norm_in) backward_norm_in(team, call, plan, block);
      team.wait();
    }
  });
  write_sum(plan.b1.values, plan.b1.output, s.hidden_features);
  write_sum(plan.b2.values, plan.b2.output, s.out_features);
  write_sum(plan.b2.values, plan.b3, s.out_features);
  write_sum(plan.norm_in_weight.values, plan.norm_in_weight.output, s.in_features);
  write_sum(plan.norm_in_bias.values, plan.norm_in_bias.output, s.in_features);
  write_sum(plan.norm_out_weight.values, plan.norm_out_weight.output, s.out_features);
  write_sum(plan.norm_out_bias.values, plan.norm_out_bias.output, s.out_features);
}

}  // namespace recmas::cpu::RECMAS_ISA
