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

// Tokens of a block: its activations stay in the shared cache; bands and chunks (product.h) take rows through a core's
// own, and lay a weight out once for a block.
constexpr int64_t kForwardBlock = RECMAS_ISA_LEVEL == 1 ? 512 : kMatrixTiles ? 1024 : 128;

inline Right weight_of(const Weight& weight, int64_t rows, int64_t columns, bool transposed, Dtype compute) {
  const int64_t k = transposed ? columns : rows, others = transposed ? rows : columns;
  if (weight.form == Form::packed) {
    return {weight.data, weight.dtype, k, Layout::panels, weight.form, k, others, compute};
  }
  const Layout layout = transposed ? Layout::columns : Layout::rows;
  return {weight.data, weight.dtype, columns, layout, weight.form, k, others, compute};
}

inline double link_flops(const LinkShape& s, Residual residual) {
  const double in = static_cast<double>(s.in_features), hidden = static_cast<double>(s.hidden_features);
  const double out = static_cast<double>(s.out_features);
  const double pairs = in * hidden + hidden * out + (residual == Residual::linear ? in * out : 0.0);
  return 2.0 * static_cast<double>(s.tokens) * pairs;
}

// Biases and gains in fp32: as given, or widened into the workspace by the first thread.
struct Vectors {
  const float *b1, *b2, *b3, *norm_in_weight, *norm_in_bias, *norm_out_weight, *norm_out_bias;
  bool widened;  // a barrier must pass before the first use
};

inline const float* plan_vector(Arena& arena, const VectorView& view, int64_t count, bool* widened) {
  if (view.data == nullptr || view.dtype == Dtype::f32) return static_cast<const float*>(view.data);
  *widened = true;
  return arena.floats(count);
}

inline Vectors plan_vectors(Arena& arena, const LinkWeights& w, const LinkShape& s) {
  Vectors v{};
  v.b1 = plan_vector(arena, w.b1, s.hidden_features, &v.widened);
  v.b2 = plan_vector(arena, w.b2, s.out_features, &v.widened);
  v.b3 = plan_vector(arena, w.b3, s.out_features, &v.widened);
  v.norm_in_weight = plan_vector(arena, w.norm_in_weight, s.in_features, &v.widened);
  v.norm_in_bias = plan_vector(arena, w.norm_in_bias, s.in_features, &v.widened);
  v.norm_out_weight = plan_vector(arena, w.norm_out_weight, s.out_features, &v.widened);
  v.norm_out_bias = plan_vector(arena, w.norm_out_bias, s.out_features, &v.widened);
  return v;
}

inline void widen_vector(const VectorView& view, const float* to, int64_t count) {
  if (view.data == nullptr || view.dtype == Dtype::f32) return;
  load_line(view.data, view.dtype, 0, count, const_cast<float*>(to));  // a piece of the workspace
}

inline void widen_vectors(const Team& team, const LinkWeights& w, const LinkShape& s, const Vectors& v) {
  if (!v.widened) return;
  if (team.rank == 0) {
    widen_vector(w.b1, v.b1, s.hidden_features);
    widen_vector(w.b2, v.b2, s.out_features);
    widen_vector(w.b3, v.b3, s.out_features);
    widen_vector(w.norm_in_weight, v.norm_in_weight, s.in_features);
    widen_vector(w.norm_in_bias, v.norm_in_bias, s.in_features);
    widen_vector(w.norm_out_weight, v.norm_out_weight, s.out_features);
    widen_vector(w.norm_out_bias, v.norm_out_bias, s.out_features);
  }
  team.wait();
}

struct ForwardPlan {
  int64_t threads, block, workspace;
  Vectors vectors;
  bool norm_in, norm_out, identity, linear;
  Left u, x, hidden;   // x: what W3 reads, the raw rows; the same as u without an input norm
  bool keeps_z;        // what the output norm reads is not kept in fp32 for the backward pass
  float* z;            // [block][out] then
  float* sums;         // of products in bands
  int64_t sum_floats;  // each thread's
  Sgemm* sgemm;
  char* scratch;
  int64_t scratch_each;  // panels being packed, then one line
  int64_t panel_scratch;

  char* panels(const Team& team) const { return scratch + team.rank * scratch_each; }
  float* line(const Team& team) const { return reinterpret_cast<float*>(panels(team) + panel_scratch); }
  Room room(const Team& team) const { return {panels(team), sums + team.rank * sum_floats, sgemm}; }
};

inline ForwardPlan plan_forward(const LinkForward& call, void* base) {
  const LinkConfig& config = call.config;
  const LinkWeights& w = call.weights;
  const LinkShape& s = config.shape;
  Arena arena(base);
  ForwardPlan plan{};
  plan.sgemm = library_of(config);
  plan.threads = useful_threads(config.threads, link_flops(s, config.residual));
  plan.vectors = plan_vectors(arena, w, s);
  plan.norm_in = w.norm_in_weight.data != nullptr;
  plan.norm_out = w.norm_out_weight.data != nullptr;
  plan.identity = config.residual == Residual::identity;
  plan.linear = config.residual == Residual::linear;
  const bool dot = kDotPairs && config.compute == Dtype::bf16;
  plan.block = smaller(s.tokens, kForwardBlock);
  plan.u = take_left(arena, plan.block, s.in_features, {dot});
  plan.x = plan.linear && plan.norm_in ? take_left(arena, plan.block, s.in_features, {dot}) : plan.u;
  plan.hidden = take_left(arena, plan.block, s.hidden_features, {dot});
  plan.keeps_z = plan.norm_out && (call.z.data == nullptr || call.z.dtype != Dtype::f32);
  if (plan.keeps_z) plan.z = arena.floats(plan.block * s.out_features);
  const Format fresh = dot ? Format::pairs : Format::f32;
  const auto fresh_bytes = [&](const Weight& weight, int64_t k) {
    const bool laid_out = weight.data != nullptr && (weight.form != Form::packed || plan.sgemm != nullptr);
    return laid_out ? panel_bytes(fresh, k) : 0;
  };
  const int64_t first = fresh_bytes(w.w1, s.in_features);
  const int64_t second = fresh_bytes(w.w2, s.hidden_features) + fresh_bytes(w.w3, s.in_features);
  plan.panel_scratch = larger(layout_bytes(dot, s.hidden_features, first), layout_bytes(dot, s.out_features, second));
  plan.panel_scratch = larger(plan.panel_scratch, as_stored_bytes(dot, plan.block, s.hidden_features + s.in_features));
  BandRoom bands{dot};
  bands.add(plan.block, s.hidden_features, piece_count(s.in_features));
  bands.add(plan.block, s.out_features,
            piece_count(s.hidden_features) + (plan.linear ? piece_count(s.in_features) : 0));
  plan.panel_scratch = larger(plan.panel_scratch, bands.scratch);
  LibraryRoom library{plan.sgemm, plan.threads};
  library.add(plan.block, s.hidden_features);
  library.add(plan.block, s.out_features);
  plan.panel_scratch = larger(plan.panel_scratch, library.bytes);
  plan.sum_floats = bands.sums;
  plan.sums = arena.floats(plan.threads * plan.sum_floats);
  plan.scratch_each = plan.panel_scratch + round_up(larger(s.in_features, s.out_features) * 4, 64) + 64;
  plan.scratch = arena.take(plan.threads * plan.scratch_each);
  plan.workspace = arena.used();
  return plan;
}

inline void forward_rows(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first,
                         int64_t tokens) {
  const int64_t columns = call.config.shape.in_features;
  const Matrix x{call.x.data, call.x.dtype, call.x.stride};
  float* line = plan.line(team);
  for (int64_t r = team.begin(tokens); r < team.end(tokens); ++r) {
    x.line(first + r, 0, columns, line);
    if (plan.norm_in) {
      if (plan.linear) {
        store_left(plan.x, r, 0, columns, line);
        pad_left(plan.x, r, columns);
      }
      const RowStatistics row = row_statistics(line, columns, call.config.eps);
      if (call.stats != nullptr) {
        call.stats[first + r] = row.mean;
        call.stats[call.config.shape.tokens + first + r] = row.reciprocal;
      }
      norm_line(line, columns, row, plan.vectors.norm_in_weight, plan.vectors.norm_in_bias);
    }
    store_left(plan.u, r, 0, columns, line);
    pad_left(plan.u, r, columns);
  }
}

// The weight as the product of `tokens` rows reads it: the library what was packed, too, so that both give the same
// bits. k: the least of the product's sums.
inline Weight chosen(const ForwardPlan& plan, const Weight& weight, int64_t tokens, int64_t columns, int64_t k) {
  if (plan.sgemm == nullptr || !library_multiplies(tokens, columns, k)) return weight;
  const Weight stored = for_library(weight);
  return stored.data == nullptr ? weight : stored;
}

inline void forward_hidden(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first,
                           int64_t tokens) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const Weight w1 = chosen(plan, call.weights.w1, tokens, s.hidden_features, s.in_features);
  const Term terms[1] = {{plan.u, weight_of(w1, s.hidden_features, s.in_features, true, config.compute)}};
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    for (int64_t r = 0; r < rows && plan.vectors.b1 != nullptr; ++r) {
      add_line(tile + r * kPanel, plan.vectors.b1 + column, columns);
    }
    if (call.pre.data != nullptr) {
      store_tile(call.pre.data, call.pre.dtype, s.hidden_features, first + row, rows, column, columns, tile);
      // The backward pass sees the stored value; the activation must be that value's.
      load_tile(call.pre.data, call.pre.dtype, s.hidden_features, first + row, rows, column, columns, tile);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* line = tile + r * kPanel;
      each_vector(columns, [&](int64_t c, auto) { store(line + c, gelu(load(line + c), config.gelu)); });
    }
    store_tile(plan.hidden, row, rows, column, columns, tile);
    for (int64_t r = row; column + columns == s.hidden_features && r < row + rows; ++r) {
      pad_left(plan.hidden, r, s.hidden_features);
    }
  };
  multiply(team, terms, tokens, s.hidden_features, plan.room(team), start_fresh, finish);
}

inline void forward_out(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first,
                        int64_t tokens) {
  const LinkConfig& config = call.config;
  const LinkShape& s = config.shape;
  const auto start = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    if (plan.identity) {
      load_tile(call.x.data, call.x.dtype, call.x.stride, first + row, rows, column, columns, tile);
    } else if (plan.vectors.b2 != nullptr || plan.vectors.b3 != nullptr) {
      clear_tile(rows, tile);
    } else {
      return false;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (plan.vectors.b2 != nullptr) add_line(tile + r * kPanel, plan.vectors.b2 + column, columns);
      if (plan.vectors.b3 != nullptr) add_line(tile + r * kPanel, plan.vectors.b3 + column, columns);
    }
    return true;
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) {
    if (call.z.data != nullptr) {
      store_tile(call.z.data, call.z.dtype, s.out_features, first + row, rows, column, columns, tile);
    }
    if (plan.keeps_z) {
      store_tile(plan.z, Dtype::f32, s.out_features, row, rows, column, columns, tile);
    } else if (!plan.norm_out) {
      store_tile(call.y.data, call.y.dtype, s.out_features, first + row, rows, column, columns, tile);
    }
  };
  const LinkWeights& w = call.weights;
  const int64_t least = plan.linear ? smaller(s.hidden_features, s.in_features) : s.hidden_features;
  const Weight w2 = chosen(plan, w.w2, tokens, s.out_features, least);
  const Term hidden{plan.hidden, weight_of(w2, s.out_features, s.hidden_features, true, config.compute)};
  if (plan.linear) {
    const Weight w3 = chosen(plan, w.w3, tokens, s.out_features, least);
    const Term residual{plan.x, weight_of(w3, s.out_features, s.in_features, true, config.compute)};
    const Term terms[2] = {hidden, residual};
    multiply(team, terms, tokens, s.out_features, plan.room(team), start, finish);
  } else {
    const Term terms[1] = {hidden};
    multiply(team, terms, tokens, s.out_features, plan.room(team), start, finish);
  }
}

inline void forward_norm_out(const Team& team, const LinkForward& call, const ForwardPlan& plan, int64_t first,
                             int64_t tokens) {
  const LinkShape& s = call.config.shape;
  const float* from = plan.keeps_z ? plan.z : static_cast<const float*>(call.z.data) + first * s.out_features;
  float* z = plan.line(team);
  for (int64_t r = team.begin(tokens); r < team.end(tokens); ++r) {
    load_line(from, Dtype::f32, r * s.out_features, s.out_features, z);
    const RowStatistics row = row_statistics(z, s.out_features, call.config.eps);
    if (call.stats != nullptr) {
      call.stats[2 * s.tokens + first + r] = row.mean;
      call.stats[3 * s.tokens + first + r] = row.reciprocal;
    }
    norm_line(z, s.out_features, row, plan.vectors.norm_out_weight, plan.vectors.norm_out_bias);
    store_line(call.y.data, call.y.dtype, (first + r) * s.out_features, s.out_features, z);
  }
}

inline int64_t link_forward_workspace(const LinkForward& call) { return plan_forward(call, nullptr).workspace; }

inline void link_forward(const LinkForward& call, void* workspace) {
  const ForwardPlan plan = plan_forward(call, workspace);
  const int64_t tokens = call.config.shape.tokens;
  run_team(plan.threads, [&](const Team& team) {
    widen_vectors(team, call.weights, call.config.shape, plan.vectors);
    for (int64_t first = 0; first < tokens; first += plan.block) {
      const int64_t count = smaller(plan.block, tokens - first);
      forward_rows(team, call, plan, first, count);
      team.wait();
      forward_hidden(team, call, plan, first, count);
      team.wait();
      forward_out(team, call, plan, first, count);
      team.wait();  // the next block overwrites the rows that a linear residual reads here, and the hidden ones
      if (plan.norm_out) forward_norm_out(team, call, plan, first, count);
    }
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
