// Attention of one query over a cache, all in fp32: scores, their softmax, and the weighted sum of values.
#pragma once

#include "math.h"
#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t score_floats(int64_t positions) { return round_up(positions, kWidth); }

// scores[t] = query . key t, whole vectors of positions; what lies beyond the last position repeats it.
template <class Stored>
void score(const float* query, const Stored* keys, int64_t stride, int64_t columns, int64_t positions, float* scores) {
  for (int64_t first = 0; first < positions; first += kWidth) {
    const Stored* key[kWidth];
    for (int j = 0; j < kWidth; ++j) key[j] = keys + smaller(first + j, positions - 1) * stride;
    Vec part[kWidth];
    for (int j = 0; j < kWidth; ++j) part[j] = set1(0.0f);
    each_vector(columns, [&](int64_t c, auto lanes) {
      const Vec q = load(query + c, lanes);
      for (int j = 0; j < kWidth; ++j) part[j] = fma(q, load(key[j] + c, lanes), part[j]);
    });
    transpose(part);
    for (int j = 1; j < kWidth; ++j) part[0] = add(part[0], part[j]);
    store(scores + first, part[0]);
  }
}

// Scores become exp(score - the largest), 0 where the mask is 0 and beyond the last position. Returns 1 / their sum; 0
// if nothing is attended. A score that is NaN makes its weight NaN.
inline float weigh(float* scores, int64_t positions, const uint8_t* mask) {
  const float none = -__builtin_inff();
  int64_t attended = positions;
  for (int64_t t = 0; mask != nullptr && t < positions; ++t) {
    if (mask[t] != 0) continue;
    scores[t] = none;
    --attended;
  }
  if (attended == 0) {
    for (int64_t t = 0; t < positions; ++t) scores[t] = 0.0f;
    return 0.0f;
  }
  const int64_t end = score_floats(positions);
  for (int64_t t = positions; t < end; ++t) scores[t] = none;
  Vec most = load(scores);
  for (int64_t t = kWidth; t < end; t += kWidth) most = max(most, load(scores + t));
  float lanes[kWidth];
  store(lanes, most);
  float largest = lanes[0];
  for (int i = 1; i < kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  const Vec shift = set1(largest), least = set1(-126.0f);
  Vec total = set1(0.0f);
  for (int64_t t = 0; t < end; t += kWidth) {
    const Vec power = mul(sub(load(scores + t), shift), set1(1.44269504f));  // log2(e)
    // max gives its second operand where one is NaN; a comparison with NaN does not choose 0.
    const Vec weight = select_greater(least, power, set1(0.0f), exp2(max(least, power)));
    total = add(total, weight);
    store(scores + t, weight);
  }
  return 1.0f / sum(total);
}

// out[c] = scale * sum_t weights[t] values[t][c], for some vectors of columns.
template <int vectors, class Stored, class Lanes>
inline void sum_values(const float* weights, const Stored* values, int64_t stride, int64_t positions, float scale,
                       float* out, Lanes lanes) {
  Vec even[vectors], odd[vectors];  // two chains of sums, so that an addition need not wait for the one before
  for (int v = 0; v < vectors; ++v) even[v] = odd[v] = set1(0.0f);
  int64_t t = 0;
  for (; t + 2 <= positions; t += 2) {
    const Stored *const a = values + t * stride, *const b = a + stride;
    const Vec p = set1(weights[t]), q = set1(weights[t + 1]);
    for (int v = 0; v < vectors; ++v) {
      even[v] = fma(p, load(a + v * kWidth, lanes), even[v]);
      odd[v] = fma(q, load(b + v * kWidth, lanes), odd[v]);
    }
  }
  if (t < positions) {
    const Vec p = set1(weights[t]);
    for (int v = 0; v < vectors; ++v) even[v] = fma(p, load(values + t * stride + v * kWidth, lanes), even[v]);
  }
  for (int v = 0; v < vectors; ++v) store(out + v * kWidth, mul(add(even[v], odd[v]), set1(scale)), lanes);
}

// out [columns] of one query over keys and values [positions][columns]. scores: score_floats(positions).
template <class Stored>
void attend(const float* query, const Stored* keys, int64_t key_stride, const Stored* values, int64_t value_stride,
            int64_t columns, int64_t positions, const uint8_t* mask, float* scores, float* out) {
  score(query, keys, key_stride, columns, positions, scores);
  const float scale = weigh(scores, positions, mask);
  constexpr int64_t kTogether = 4;
  int64_t c = 0;
  for (; c + kTogether * kWidth <= columns; c += kTogether * kWidth) {
    sum_values<kTogether>(scores, values + c, value_stride, positions, scale, out + c, Whole{});
  }
  each_vector(columns - c, [&](int64_t i, auto lanes) {
    sum_values<1>(scores, values + c + i, value_stride, positions, scale, out + c + i, lanes);
  });
}

}  // namespace recmas::cpu::RECMAS_ISA
