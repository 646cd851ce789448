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

struct Wanted {
  bool hidden;     // dp: something before the activation
  bool hidden_x;   // du: something before W1
  bool norm_in, norm_out, linear, identity;
};

inline Wanted wanted_of(const LinkBackward& call) {
  Wanted w{};
  w.norm_in = call.weights.norm_in_weight.data != nullptr;
  w.norm_out = call.weights.norm_out_weight.data != nullptr;
  w.linear = call.config.residual == Residual::linear;
  w.identity = call.config.residual == Residual::identity;
  w.hidden_x = call.dx.data != nullptr || call.dnorm_in_weight.data != nullptr || call.dnorm_in_bias.data != nullptr;
  w.hidden = w.hidden_x || call.dw1.data != nullptr || call.db1.data != nullptr;
  return w;
}

// A gradient summed over blocks in fp32: the output itself where that is fp32, else a piece of the workspace.
struct Sum {
  Output output;
  float* values;
};

inline Sum take_sum(Arena& arena, const Output& output, int64_t count) {
  if (output.data == nullptr) return {output, nullptr};
  if (output.dtype == Dtype::f32) return {output, static_cast<float*>(output.data)};
  return {output, arena.floats(count)};
}

struct BackwardPlan {
  int64_t threads, block, workspace;
  Wanted wanted;
  Left dz, dz_transposed;  // [block][out], [out][block]
  Left dp, dp_transposed;  // [block][hidden], [hidden][block]
  Left u, activation;      // [block][in], [block][hidden]
  float *du, *residual;    // [block][in]: gradient at u, and dz W3 where an input norm keeps the two apart
  Sum w1, b1, w2, b2, w3, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias;
  Output b3;
  char* scratch;
  int64_t scratch_each;
};

inline BackwardPlan plan_backward(const LinkBackward& call, void* base) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  Arena arena(base);
  BackwardPlan plan{};
  plan.threads = useful_threads(config.threads, 2.0 * link_flops(s, config.residual));
  plan.block = smaller(s.tokens, kBackwardBlock);
  const Wanted w = plan.wanted = wanted_of(call);
  const bool dot = kDotPairs && config.compute == Dtype::bf16;
  plan.dz = take_left(arena, plan.block, s.out_features, dot);
  if (call.dw2.data != nullptr || call.dw3.data != nullptr) {
    plan.dz_transposed = take_left(arena, s.out_features, plan.block, dot);
  }
  if (w.hidden) plan.dp = take_left(arena, plan.block, s.hidden_features, dot);
  if (call.dw1.data != nullptr) {
    plan.dp_transposed = take_left(arena, s.hidden_features, plan.block, dot);
    if (w.norm_in) plan.u = take_left(arena, plan.block, s.in_features, dot);
  }
  if (call.dw2.data != nullptr) plan.activation = take_left(arena, plan.block, s.hidden_features, dot);
  if (w.hidden_x && w.norm_in) {
    plan.du = arena.floats(plan.block * s.in_features);
    if (w.linear && call.dx.data != nullptr) plan.residual = arena.floats(plan.block * s.in_features);
  }
  plan.w1 = take_sum(arena, call.dw1, s.hidden_features * s.in_features);
  plan.b1 = take_sum(arena, call.db1, s.hidden_features);
  plan.w2 = take_sum(arena, call.dw2, s.out_features * s.hidden_features);
  const bool shared_bias = call.db2.data == nullptr && call.db3.data != nullptr;  // db3 = db2
  plan.b2 = take_sum(arena, shared_bias ? call.db3 : call.db2, s.out_features);
  plan.b3 = shared_bias ? Output{nullptr, Dtype::f32} : call.db3;
  plan.w3 = take_sum(arena, call.dw3, s.out_features * s.in_features);
  plan.norm_in_weight = take_sum(arena, call.dnorm_in_weight, s.in_features);
  plan.norm_in_bias = take_sum(arena, call.dnorm_in_bias, s.in_features);
  plan.norm_out_weight = take_sum(arena, call.dnorm_out_weight, s.out_features);
  plan.norm_out_bias = take_sum(arena, call.dnorm_out_bias, s.out_features);
  const Format fresh = dot ? Format::pairs : Format::f32;
  const int64_t deepest = larger(s.out_features + s.hidden_features, plan.block);
  plan.scratch_each = panel_bytes(fresh, deepest) + 2 * step_bytes(fresh) + 64;
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

inline void backward_rows(const Team& team, const LinkBackward& call, const BackwardPlan& plan, const BackwardBlock& block) {
  const LinkShape& s = call.config.shape;
  const Matrix dy = rows_from(call.dy, block.first), z = rows_from(call.z, block.first), x = rows_from(call.x, block.first);
  for (int64_t r = team.begin(block.tokens); r < team.end(block.tokens); ++r) {
    if (plan.wanted.norm_out) {
      norm_backward_row(dy, z, r, s.out_features, saved_statistics(call, block.first + r, true),
                        call.weights.norm_out_weight,
                        [&](int64_t c, Vec value, int64_t count) { store_left(plan.dz, r, c, value, count); });
    } else {
      for (int64_t c = 0; c < s.out_features; c += kWidth) {
        const int64_t count = smaller(kWidth, s.out_features - c);
        store_left(plan.dz, r, c, dy.at(r, c, count), count);
      }
    }
    pad_left(plan.dz, r, s.out_features);
    if (plan.u.data == nullptr) continue;
    const RowStatistics row = saved_statistics(call, block.first + r, false);
    for (int64_t c = 0; c < s.in_features; c += kWidth) {
      const int64_t count = smaller(kWidth, s.in_features - c);
      const Vec u = fma(normalised(x.at(r, c, count), row), vector_at(call.weights.norm_in_weight, c, count, 1.0f),
                        vector_at(call.weights.norm_in_bias, c, count, 0.0f));
      store_left(plan.u, r, c, u, count);
    }
  }
}

// to [columns][rows] = from [rows][columns] transposed; each thread takes whole rows of `to`.
inline void transpose_left(const Team& team, const Left& from, int64_t rows, int64_t columns, const Left& to) {
  const int64_t bands = (columns + kWidth - 1) / kWidth;
  for (int64_t band = team.begin(bands); band < team.end(bands); ++band) {
    const int64_t c = band * kWidth, width = smaller(kWidth, columns - c);
    for (int64_t r = 0; r < rows; r += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = r + i < rows ? load_left(from, r + i, c, width) : set1(0.0f);
      transpose(block);
      for (int64_t i = 0; i < width; ++i) store_left(to, c + i, r, block[i], smaller(kWidth, to.stride - r));
    }
    for (int64_t i = 0; i < width; ++i) pad_left(to, c + i, smaller(round_up(rows, kWidth), to.stride));
  }
}

inline void backward_out_sums(const Team& team, const LinkBackward& call, const BackwardPlan& plan, const BackwardBlock& block) {
  const LinkShape& s = call.config.shape;
  const Matrix dy = rows_from(call.dy, block.first), z = rows_from(call.z, block.first);
  if (plan.dz_transposed.data != nullptr) {
    transpose_left(team, plan.dz, block.tokens, s.out_features, plan.dz_transposed);
  }
  if (plan.b2.values != nullptr) {
    sum_columns(team, block.tokens, s.out_features, plan.b2.values, block.accumulate,
                [&](int64_t r, int64_t c, int64_t count) { return load_left(plan.dz, r, c, count); });
  }
  if (plan.norm_out_bias.values != nullptr) {
    sum_columns(team, block.tokens, s.out_features, plan.norm_out_bias.values, block.accumulate,
                [&](int64_t r, int64_t c, int64_t count) { return dy.at(r, c, count); });
  }
  if (plan.norm_out_weight.values != nullptr) {
    sum_columns(team, block.tokens, s.out_features, plan.norm_out_weight.values, block.accumulate,
                [&](int64_t r, int64_t c, int64_t count) {
                  return mul(dy.at(r, c, count), normalised(z.at(r, c, count), saved_statistics(call, block.first + r, true)));
                });
  }
}

inline void backward_hidden(const Team& team, const LinkBackward& call, const BackwardPlan& plan, const BackwardBlock& block) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const Matrix pre = rows_from(call.pre, block.first);
  const bool keep = plan.activation.data != nullptr;
  if (!plan.wanted.hidden) {
    for (int64_t r = team.begin(keep ? block.tokens : 0); r < team.end(keep ? block.tokens : 0); ++r) {
      for (int64_t c = 0; c < s.hidden_features; c += kWidth) {
        const int64_t count = smaller(kWidth, s.hidden_features - c);
        store_left(plan.activation, r, c, gelu(pre.at(r, c, count), config.gelu), count);
      }
    }
    return;
  }
  const Term terms[1] = {{plan.dz, weight_of(call.weights.w2, s.out_features, s.hidden_features, false, config.compute)}};
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      Vec activation;
      const Vec slope = gelu_gradient(pre.at(r, c, count), config.gelu, &activation);
      store_left(plan.dp, r, c, mul(load(tile + at), slope), count);
      if (keep) store_left(plan.activation, r, c, activation, count);
    });
    if (column + columns == s.hidden_features) {
      for (int64_t r = row; r < row + rows; ++r) pad_left(plan.dp, r, s.hidden_features);
    }
  };
  multiply(team, terms, block.tokens, s.hidden_features, plan.scratch + team.rank * plan.scratch_each, start_at_zero, finish);
}

// sum [rows][columns] (+)= left [rows][tokens] x right [tokens][columns], rounded to the output after the last block.
inline void add_weight_gradient(const Team& team, const BackwardPlan& plan, const Sum& gradient, const Left& left,
                                const Matrix& right, int64_t rows, int64_t columns, const BackwardBlock& block,
                                Dtype compute, bool last) {
  if (gradient.values == nullptr) return;
  const Term terms[1] = {{left, {right.data, right.dtype, right.stride, false, false, block.tokens, columns, compute}}};
  const auto start = [&](int64_t row, int64_t count, int64_t column, int64_t width, float* tile) {
    if (!block.accumulate) return start_at_zero(row, count, column, width, tile);
    for_each_vector(row, count, column, width, [&](int64_t r, int64_t c, int64_t at, int64_t lanes) {
      store(tile + at, load(gradient.values + r * columns + c, lanes));
    });
  };
  const auto finish = [&](int64_t row, int64_t count, int64_t column, int64_t width, const float* tile) {
    for_each_vector(row, count, column, width, [&](int64_t r, int64_t c, int64_t at, int64_t lanes) {
      if (last) {
        store_any(gradient.output.data, gradient.output.dtype, r * columns + c, load(tile + at), lanes);
      } else {
        store(gradient.values + r * columns + c, load(tile + at), lanes);
      }
    });
  };
  multiply(team, terms, rows, columns, plan.scratch + team.rank * plan.scratch_each, start, finish);
}

inline void backward_in(const Team& team, const LinkBackward& call, const BackwardPlan& plan, const BackwardBlock& block) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  char* scratch = plan.scratch + team.rank * plan.scratch_each;
  const Term residual{plan.dz, weight_of(call.weights.w3, s.out_features, s.in_features, false, config.compute)};
  const auto keep = [&](float* out) {
    return [&s, out](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
      for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
        store(out + r * s.in_features + c, load(tile + at), count);
      });
    };
  };
  const Term hidden{plan.dp, weight_of(call.weights.w1, s.hidden_features, s.in_features, false, config.compute)};
  if (plan.wanted.norm_in) {
    const Term first[1] = {hidden};
    multiply(team, first, block.tokens, s.in_features, scratch, start_at_zero, keep(plan.du));
    if (plan.residual != nullptr) {
      const Term second[1] = {residual};
      multiply(team, second, block.tokens, s.in_features, scratch, start_at_zero, keep(plan.residual));
    }
    return;
  }
  const auto start = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    if (!plan.wanted.identity) return start_at_zero(row, rows, column, columns, tile);
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      store(tile + at, load_left(plan.dz, r, c, count));
    });
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      store_any(call.dx.data, call.dx.dtype, (block.first + r) * s.in_features + c, load(tile + at), count);
    });
  };
  if (plan.wanted.linear) {
    const Term terms[2] = {hidden, residual};
    multiply(team, terms, block.tokens, s.in_features, scratch, start, finish);
  } else {
    const Term terms[1] = {hidden};
    multiply(team, terms, block.tokens, s.in_features, scratch, start, finish);
  }
}

inline void backward_norm_in(const Team& team, const LinkBackward& call, const BackwardPlan& plan, const BackwardBlock& block) {
  const LinkShape& s = call.config.shape;
  const Matrix x = rows_from(call.x, block.first), du{plan.du, Dtype::f32, s.in_features};
  if (call.dx.data != nullptr) {
    for (int64_t r = team.begin(block.tokens); r < team.end(block.tokens); ++r) {
      norm_backward_row(du, x, r, s.in_features, saved_statistics(call, block.first + r, false),
                        call.weights.norm_in_weight, [&](int64_t c, Vec value, int64_t count) {
                          if (plan.wanted.identity) value = add(value, load_left(plan.dz, r, c, count));
                          if (plan.residual != nullptr) value = add(value, load(plan.residual + r * s.in_features + c, count));
                          store_any(call.dx.data, call.dx.dtype, (block.first + r) * s.in_features + c, value, count);
                        });
    }
  }
  if (plan.norm_in_bias.values != nullptr) {
    sum_columns(team, block.tokens, s.in_features, plan.norm_in_bias.values, block.accumulate,
                [&](int64_t r, int64_t c, int64_t count) { return du.at(r, c, count); });
  }
  if (plan.norm_in_weight.values != nullptr) {
    sum_columns(team, block.tokens, s.in_features, plan.norm_in_weight.values, block.accumulate,
                [&](int64_t r, int64_t c, int64_t count) {
                  return mul(du.at(r, c, count), normalised(x.at(r, c, count), saved_statistics(call, block.first + r, false)));
                });
  }
}

inline void round_sum(const Sum& sum, int64_t count) {
  if (sum.values == nullptr || sum.output.dtype == Dtype::f32) return;
  for (int64_t c = 0; c < count; c += kWidth) {
    const int64_t lanes = smaller(kWidth, count - c);
    store_any(sum.output.data, sum.output.dtype, c, load(sum.values + c, lanes), lanes);
  }
}

inline int64_t link_backward_workspace(const LinkBackward& call) { return plan_backward(call, nullptr).workspace; }

inline void link_backward(const LinkBackward& call, void* workspace) {
  const BackwardPlan plan = plan_backward(call, workspace);
  const LinkShape& s = call.config.shape;
  const Dtype compute = call.config.compute;
  run_team(plan.threads, [&](const Team& team) {
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
      if (plan.b1.values != nullptr) {
        sum_columns(team, block.tokens, s.hidden_features, plan.b1.values, block.accumulate,
                    [&](int64_t r, int64_t c, int64_t count) { return load_left(plan.dp, r, c, count); });
      }
      add_weight_gradient(team, plan, plan.w2, plan.dz_transposed, as_matrix(plan.activation), s.out_features,
                          s.hidden_features, block, compute, last);
      add_weight_gradient(team, plan, plan.w3, plan.dz_transposed, x, s.out_features, s.in_features, block, compute, last);
      if (plan.wanted.hidden_x) backward_in(team, call, plan, block);
      team.wait();
      add_weight_gradient(team, plan, plan.w1, plan.dp_transposed, plan.wanted.norm_in ? as_matrix(plan.u) : x,
                          s.hidden_features, s.in_features, block, compute, last);
      if (plan.wanted.hidden_x && plan.wanted.norm_in) backward_norm_in(team, call, plan, block);
      team.wait();
    }
  });
  round_sum(plan.b1, s.hidden_features);
  round_sum(plan.b2, s.out_features);
  if (plan.b3.data != nullptr) round_sum({plan.b3, plan.b2.values}, s.out_features);
  if (plan.b3.data != nullptr && plan.b3.dtype == Dtype::f32) {
    __builtin_memcpy(plan.b3.data, plan.b2.values, static_cast<size_t>(s.out_features) * sizeof(float));
  }
  round_sum(plan.norm_in_weight, s.in_features);
  round_sum(plan.norm_in_bias, s.in_features);
  round_sum(plan.norm_out_weight, s.out_features);
  round_sum(plan.norm_out_bias, s.out_features);
}

}  // namespace recmas::cpu::RECMAS_ISA
