// The link, forward. Tokens go through in blocks; within a block four phases, a barrier after each:
//     rows     u = norm_in(x)                           (and x itself where another product reads it)
//     product  a = gelu(u W1^T + b1)                    (and pre)
//     product  z = residual + b2 (+ b3) + a W2^T (+ x W3^T in the same sum)
//     rows     y = norm_out(z)                          (without an output norm the product writes y)
#pragma once

#include "arena.h"
#include "math.h"
#include "rows.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t kForwardBlock = 256;  // tokens: the block's activations stay in the shared cache

inline Right weight_of(const Weight& weight, int64_t rows, int64_t columns, bool transposed, Dtype compute) {
  return transposed ? Right{weight.data, weight.dtype, columns, true, weight.packed, columns, rows, compute}
                    : Right{weight.data, weight.dtype, columns, false, weight.packed, rows, columns, compute};
}

inline double link_flops(const LinkShape& s, Residual residual) {
  const double pairs = static_cast<double>(s.in_features) * static_cast<double>(s.hidden_features) +
                       static_cast<double>(s.hidden_features) * static_cast<double>(s.out_features) +
                       (residual == Residual::linear
                            ? static_cast<double>(s.in_features) * static_cast<double>(s.out_features)
                            : 0.0);
  return 2.0 * static_cast<double>(s.tokens) * pairs;
}

struct ForwardPlan {
  int64_t threads, block, workspace;
  bool dot;         // rows are kept in bf16 and multiplied as pairs
  bool separate_x;  // the residual product reads raw x, which differs from u
  Left u, x, hidden;
  float* z;
  char* scratch;
  int64_t scratch_each;
};

inline Left take_left(Arena& arena, int64_t rows, int64_t k, bool bf16) {
  Left left{nullptr, left_stride(k, bf16), bf16};
  left.data = arena.take(rows * left.bytes());
  return left;
}

inline ForwardPlan plan_forward(const LinkForward& call, void* base) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  Arena arena(base);
  ForwardPlan plan{};
  plan.threads = useful_threads(config.threads, link_flops(s, config.residual));
  plan.block = smaller(s.tokens, kForwardBlock);
  plan.dot = kDotPairs && config.compute == Dtype::bf16;
  const bool norm_in = call.weights.norm_in_weight.data != nullptr;
  const bool norm_out = call.weights.norm_out_weight.data != nullptr;
  const bool linear = config.residual == Residual::linear;
  plan.separate_x = linear && norm_in;
  plan.u = take_left(arena, plan.block, s.in_features, plan.dot);
  plan.x = plan.separate_x ? take_left(arena, plan.block, s.in_features, plan.dot) : plan.u;
  plan.hidden = take_left(arena, plan.block, s.hidden_features, plan.dot);
  if (norm_out) plan.z = arena.floats(plan.block * s.out_features);
  const Format fresh = plan.dot ? Format::pairs : Format::f32;
  const int64_t first = call.weights.w1.packed ? 0 : panel_bytes(fresh, s.in_features);
  const int64_t second = (call.weights.w2.packed ? 0 : panel_bytes(fresh, s.hidden_features)) +
                         (linear && !call.weights.w3.packed ? panel_bytes(fresh, s.in_features) : 0);
  plan.scratch_each = larger(first, second);
  plan.scratch = arena.take(plan.threads * plan.scratch_each);
  plan.workspace = arena.used();
  return plan;
}

inline void forward_rows(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first, int64_t tokens) {
  const LinkConfig& config = call.config;
  const LinkWeights& weights = call.weights;
  const int64_t columns = config.shape.in_features;
  const Matrix x{call.x.data, call.x.dtype, call.x.stride};
  const bool norm = weights.norm_in_weight.data != nullptr;
  for (int64_t r = team.begin(tokens); r < team.end(tokens); ++r) {
    RowStatistics row{};
    if (norm) {
      row = row_statistics(x, first + r, columns, config.eps);
      if (call.stats != nullptr) {
        call.stats[first + r] = row.mean;
        call.stats[config.shape.tokens + first + r] = row.reciprocal;
      }
    }
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t count = smaller(kWidth, columns - c);
      const Vec value = x.at(first + r, c, count);
      if (plan.separate_x) store_left(plan.x, r, c, value, count);
      const Vec u = norm ? fma(normalised(value, row), vector_at(weights.norm_in_weight, c, count, 1.0f),
                               vector_at(weights.norm_in_bias, c, count, 0.0f))
                         : value;
      store_left(plan.u, r, c, u, count);
    }
    pad_left(plan.u, r, columns);
    if (plan.separate_x) pad_left(plan.x, r, columns);
  }
}

inline void forward_hidden(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first, int64_t tokens) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const Term terms[1] = {{plan.u, weight_of(call.weights.w1, s.hidden_features, s.in_features, true, config.compute)}};
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      Vec p = add(load(tile + at), vector_at(call.weights.b1, c, count, 0.0f));
      if (call.pre.data != nullptr) {
        // The backward pass sees the stored value; the activation must be that value's.
        p = round_to(p, call.pre.dtype);
        store_any(call.pre.data, call.pre.dtype, (first + r) * s.hidden_features + c, p, count);
      }
      store_left(plan.hidden, r, c, gelu(p, config.gelu), count);
    });
    if (column + columns == s.hidden_features) {
      for (int64_t r = row; r < row + rows; ++r) pad_left(plan.hidden, r, s.hidden_features);
    }
  };
  multiply(team, terms, tokens, s.hidden_features, plan.scratch + team.rank * plan.scratch_each, start_at_zero, finish);
}

inline void forward_out(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first, int64_t tokens) {
  const LinkConfig& config = call.config;
  const LinkWeights& weights = call.weights;
  const LinkShape& s = config.shape;
  const Matrix x{call.x.data, call.x.dtype, call.x.stride};
  const bool identity = config.residual == Residual::identity, linear = config.residual == Residual::linear;
  const auto start = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      Vec z = vector_at(weights.b2, c, count, 0.0f);
      if (linear) z = add(z, vector_at(weights.b3, c, count, 0.0f));
      if (identity) z = add(z, x.at(first + r, c, count));
      store(tile + at, z);
    });
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for_each_vector(row, rows, column, columns, [&](int64_t r, int64_t c, int64_t at, int64_t count) {
      const Vec z = load(tile + at);
      if (call.z.data != nullptr) {
        store_any(call.z.data, call.z.dtype, (first + r) * s.out_features + c, z, count);
      }
      if (plan.z != nullptr) {
        store(plan.z + r * s.out_features + c, z, count);
      } else {
        store_any(call.y.data, call.y.dtype, (first + r) * s.out_features + c, z, count);
      }
    });
  };
  char* scratch = plan.scratch + team.rank * plan.scratch_each;
  const Term hidden{plan.hidden, weight_of(weights.w2, s.out_features, s.hidden_features, true, config.compute)};
  if (linear) {
    const Term residual{plan.x, weight_of(weights.w3, s.out_features, s.in_features, true, config.compute)};
    const Term terms[2] = {hidden, residual};
    multiply(team, terms, tokens, s.out_features, scratch, start, finish);
  } else {
    const Term terms[1] = {hidden};
    multiply(team, terms, tokens, s.out_features, scratch, start, finish);
  }
}

inline void forward_norm_out(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first, int64_t tokens) {
  const LinkShape& s = call.config.shape;
  const Matrix z{plan.z, Dtype::f32, s.out_features};
  for (int64_t r = team.begin(tokens); r < team.end(tokens); ++r) {
    const RowStatistics row = row_statistics(z, r, s.out_features, call.config.eps);
    if (call.stats != nullptr) {
      call.stats[2 * s.tokens + first + r] = row.mean;
      call.stats[3 * s.tokens + first + r] = row.reciprocal;
    }
    for (int64_t c = 0; c < s.out_features; c += kWidth) {
      const int64_t count = smaller(kWidth, s.out_features - c);
      const Vec y = fma(normalised(z.at(r, c, count), row), vector_at(call.weights.norm_out_weight, c, count, 1.0f),
                        vector_at(call.weights.norm_out_bias, c, count, 0.0f));
      store_any(call.y.data, call.y.dtype, (first + r) * s.out_features + c, y, count);
    }
  }
}

inline int64_t link_forward_workspace(const LinkForward& call) { return plan_forward(call, nullptr).workspace; }

inline void link_forward(const LinkForward& call, void* workspace) {
  const ForwardPlan plan = plan_forward(call, workspace);
  const int64_t tokens = call.config.shape.tokens;
  run_team(plan.threads, [&](const Team& team) {
    for (int64_t first = 0; first < tokens; first += plan.block) {
      const int64_t count = smaller(plan.block, tokens - first);
      forward_rows(team, call, plan, first, count);
      team.wait();
      forward_hidden(team, call, plan, first, count);
      team.wait();
      forward_out(team, call, plan, first, count);
      if (plan.z != nullptr) {
        team.wait();
        forward_norm_out(team, call, plan, first, count);
      }
    }
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
