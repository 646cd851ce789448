// The alignment loss and its gradient in one pass over the rows (link.h states the formula).
//
// With e' = s e, cos = p.e' / (|p| |e'|) where each norm is at least 1e-8 (torch's cosine_similarity):
//     d loss / d p = mask / sum(mask) * (-cw (e' / (|p||e'|) - cos p / |p|^2) + 2 mw (p - e') / features)
// and the second cosine term is absent where |p| is below the bound, as the norm is then constant.
#pragma once

#include "arena.h"
#include "rows.h"

namespace recmas::cpu::RECMAS_ISA {

inline int64_t alignment_workspace(const Alignment& call) {
  Arena arena(nullptr);
  arena.floats(call.tokens);
  return arena.used();
}

inline float alignment_row(const Alignment& call, int64_t t, float share) {
  const Matrix pred{call.pred.data, call.pred.dtype, call.pred.stride};
  const Matrix target{call.target.data, call.target.dtype, call.target.stride};
  const int64_t target_row = call.token_ids == nullptr ? t : call.token_ids[t];
  const Vec scale = set1(call.embed_scale);
  const int64_t columns = call.features;
  Vec along = set1(0.0f), pred_squares = along, target_squares = along, squares = along;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = smaller(kWidth, columns - c);
    const Vec p = pred.at(t, c, count), e = mul(scale, target.at(target_row, c, count)), difference = sub(p, e);
    along = fma(p, e, along);
    pred_squares = fma(p, p, pred_squares);
    target_squares = fma(e, e, target_squares);
    squares = fma(difference, difference, squares);
  }
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
  const Vec target_rate = set1(-share * call.cosine_weight / pred_bounded / target_bounded - mse_rate);
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t count = smaller(kWidth, columns - c);
    const Vec p = pred.at(t, c, count), e = mul(scale, target.at(target_row, c, count));
    store_any(call.grad.data, call.grad.dtype, t * columns + c, fma(pred_rate, p, mul(target_rate, e)), count);
  }
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
    for (int64_t t = team.begin(call.tokens); t < team.end(call.tokens); ++t) {
      const float mask = call.mask == nullptr ? 1.0f : call.mask[t];
      if (mask == 0.0f || per_row == 0.0f) {  // a row outside the mask contributes nothing, whatever it holds
        losses[t] = 0.0f;
        for (int64_t c = 0; c < call.features; c += kWidth) {
          store_any(call.grad.data, call.grad.dtype, t * call.features + c, set1(0.0f),
                    smaller(kWidth, call.features - c));
        }
      } else {
        losses[t] = alignment_row(call, t, mask * per_row);
      }
    }
  });
  double loss = 0.0;
  for (int64_t t = 0; t < call.tokens; ++t) loss += static_cast<double>(losses[t]);
  *call.loss = static_cast<float>(loss);
}

}  // namespace recmas::cpu::RECMAS_ISA
