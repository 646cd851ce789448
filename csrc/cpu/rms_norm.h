// RMSNorm over rows: y = x / sqrt(mean(x^2) + eps) * (offset + gain), in one pass over memory. Sums are fp32.
#pragma once

#include "threads.h"
#include "vec.h"

namespace recmas::cpu::RECMAS_ISA {

// y: a pointer, or where the parts of a row lie.
template <class Stored, class Gain, class Result>
void rms_norm_row(const Stored* x, const Gain* gain, int64_t columns, float offset, float eps, Result y) {
  // Four sums side by side, since a lone one would wait for each of its additions.
  constexpr int64_t stride = 4 * kWidth;
  const int64_t whole = columns / stride * stride;
  Vec part[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t c = 0; c < whole; c += stride) {
    for (int i = 0; i < 4; ++i) {
      const Vec value = load(x + c + i * kWidth);
      part[i] = fma(value, value, part[i]);
    }
  }
  each_vector(columns - whole, [&](int64_t c, auto lanes) {
    const Vec value = load(x + whole + c, lanes);
    part[0] = fma(value, value, part[0]);
  });
  const float total = sum(add(add(part[0], part[1]), add(part[2], part[3])));
  const Vec scale = set1(1.0f / __builtin_sqrtf(total / static_cast<float>(columns) + eps));
  each_vector(columns, [&](int64_t c, auto lanes) {
    const Vec factor = add(set1(offset), load(gain + c, lanes));
    store(y + c, mul(mul(load(x + c, lanes), scale), factor), lanes);
  });
}

inline void rms_norm(const RmsNorm& call) {
  const double elements = static_cast<double>(call.rows) * static_cast<double>(call.columns);
  run_team(useful_threads(call.threads, 8.0 * elements), [&](const Team& team) {
    typed(call.y.data, call.x.dtype, [&](auto* y) {  // rows and result are of one dtype
      const decltype(y) x = static_cast<decltype(y)>(const_cast<void*>(call.x.data));
      typed(call.gain.data, call.gain.dtype, [&](const auto* gain) {
        for (int64_t r = team.begin(call.rows); r < team.end(call.rows); ++r) {
          rms_norm_row(x + r * call.x.stride, gain, call.columns, call.offset, call.eps, y + r * call.columns);
        }
      });
    });
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
