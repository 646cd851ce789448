// The alignment loss and its gradient in one pass over the rows (link.h states the formula).
//
// With e' = s e, cos = p.e' / (|p| |e'|) where each norm is at least 1e-8 (torch's cosine_similarity):
//     d loss / d p = mask / sum(mask) * (-cw (e' / (|p||e'|) - cos p / |p|^2) + 2 mw (p - e') / features)
// and the second cosine term is absent where |p| is below the bound, as the norm is then constant.
#pragma once

#include "rows.h"

namespace recmas::cpu::RECMAS_ISA {

// A loss per row, then two lines per thread.
inline int64_t alignment_line(const Alignment& call) { return round_up(call.features, 16); }
inline int64_t alignment_workspace(const Alignment& call) {
  return (round_up(call.tokens, 16) + 2 * call.threads * alignment_line(call)) * 4;
}

inline int64_t target_row_of(const Alignment& call, int64_t t) {
  return call.token_ids == nullptr ? t : call.token_ids[t];
}

// Gathered rows lie anywhere: the hardware's prefetcher sees a row coming only once it is being read.
inline void prefetch_target(const Alignment& call, int64_t t) {
  if (t >= call.tokens || (call.mask != nullptr && call.mask[t] == 0.0f)) return;
  const int64_t bytes = dtype_bytes(call.target.dtype);
  const char* row = static_cast<const char*>(call.target.data) + target_row_of(call, t) * call.target.stride * bytes;
  for (int64_t byte = 0; byte < call.features * bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

inline float alignment_row(const Alignment& call, int64_t t, float share, float* p, float* e) {
  const int64_t columns = call.features;
  load_line(call.pred.data, call.pred.dtype, t * call.pred.stride, columns, p);
  load_line(call.target.data, call.target.dtype, target_row_of(call, t) * call.target.stride, columns, e);
  const Vec scale = set1(call.embed_scale);
  Vec along = set1(0.0f), pred_squares = along, target_squares = along, squares = along;
  each_vector(columns, [&](int64_t c, auto lanes) {
    const Vec at = load(p + c, lanes), goal = mul(scale, load(e + c, lanes)), difference = sub(at, goal);
    along = fma(at, goal, along);
    pred_squares = fma(at, at, pred_squares);
    target_squares = fma(goal, goal, target_squares);
    squares = fma(difference, difference, squares);
  });
  const float least = 1e-8f;
  const float pred_norm = __builtin_sqrtf(sum(pred_squares)), target_norm = __builtin_sqrtf(sum(target_squares));
  const float pred_bounded = pred_norm < least ? least : pred_norm;
  const float target_bounded = target_norm < least ? least : target_norm;
  const float cosine = sum(along) / pred_bounded / target_bounded;
  const float mean_squares = sum(squares) / static_cast<float>(columns);
  const float mse_rate = share * 2.0f * call.mse_weight / static_cast<float>(columns);
  // gradient = pred_rate * p + target_rate * e'
  const float shrink = pred_norm < least ? 0.0f : cosine / pred_bounded / pred_bounded;
  const Vec pred_rate = set1(share * call.cosine_weight * shrink + mse_rate);
  const Vec target_rate = mul(scale, set1(-share * call.cosine_weight / pred_bounded / target_bounded - mse_rate));
  each_vector(columns, [&](int64_t c, auto lanes) {
    store(p + c, fma(pred_rate, load(p + c, lanes), mul(target_rate, load(e + c, lanes))), lanes);
  });
  store_line(call.grad.data, call.grad.dtype, t * columns, columns, p);
  return share * (call.cosine_weight * (1.0f - cosine) + call.mse_weight * mean_squares);
}

inline void alignment(const Alignment& call, void* workspace) {
  float* losses = static_cast<float*>(workspace);
  double total_mask = call.mask == nullptr ? static_cast<double>(call.tokens) : 0.0;
  if (call.mask != nullptr) {
    for (int64_t t = 0; t < call.tokens; ++t) total_mask += static_cast<double>(call.mask[t]);
  }
  const float per_row = total_mask == 0.0 ? 0.0f : static_cast<float>(1.0 / total_mask);
  const double flops = 12.0 * static_cast<double>(call.tokens) * static_cast<double>(call.features);
  run_team(useful_threads(call.threads, flops), [&](const Team& team) {
    float* lines = losses + round_up(call.tokens, 16) + 2 * team.rank * alignment_line(call);
    for (int64_t t = team.begin(call.tokens); t < team.end(call.tokens); ++t) {
      const float mask = call.mask == nullptr ? 1.0f : call.mask[t];
      prefetch_target(call, t + 1);
      if (mask == 0.0f || per_row == 0.0f) {  // a row outside the mask contributes nothing, whatever it holds
        losses[t] = 0.0f;
        const int64_t row_bytes = call.features * dtype_bytes(call.grad.dtype);
        __builtin_memset(static_cast<char*>(call.grad.data) + t * row_bytes, 0, static_cast<size_t>(row_bytes));
      } else {
        losses[t] = alignment_row(call, t, mask * per_row, lines, lines + alignment_line(call));
      }
    }
  });
  double loss = 0.0;
  for (int64_t t = 0; t < call.tokens; ++t) loss += static_cast<double>(losses[t]);
  *call.loss = static_cast<float>(loss);
}

}  // namespace recmas::cpu::RECMAS_ISA
