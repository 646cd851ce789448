// Attention of one position over a cache, all in fp32: scores, their softmax, and the weighted sum of values. Heads
// that share keys and values are computed side by side, so that these are read once, in the order in which they lie.
#pragma once

#include "math.h"
#include "types.h"

namespace recmas::cpu::RECMAS_ISA {

constexpr int64_t score_floats(int64_t positions) { return round_up(positions, kWidth); }

// Keys and values of some heads, counted over all rows, asked for ahead of where they are read: each is a few KB, which
// end before the processor has seen that they are read in order.
class CacheAhead {
 public:
  CacheAhead(const CacheView& keys, const CacheView& values, int64_t key_heads, int64_t columns, int64_t positions,
             int64_t first, int64_t end)
      : views_{keys, values},
        key_heads_(key_heads),
        bytes_(columns * dtype_bytes(keys.dtype)),
        positions_(positions),
        head_(first),
        end_(end) {
    begin();
    ask(kBytes / bytes_);
  }

  // So many more positions, of keys or values, whichever follow.
  RECMAS_ALWAYS_INLINE void ask(int64_t count) {
    for (; count > 0 && head_ < end_; --count) {
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(at_ + i);
      at_ += step_;
      if (--left_ > 0) continue;
      head_ += of_;
      of_ = 1 - of_;
      begin();
    }
  }

 private:
  static constexpr int64_t kBytes = 8192;

  void begin() {
    const CacheView& view = views_[of_];
    const int64_t row = head_ / key_heads_, head = head_ % key_heads_, bytes = dtype_bytes(view.dtype);
    at_ = static_cast<const char*>(view.data) + (row * view.row_stride + head * view.head_stride) * bytes;
    step_ = view.position_stride * bytes;
    left_ = positions_;
  }

  const CacheView views_[2];
  const int64_t key_heads_, bytes_, positions_;
  int64_t head_, end_, of_ = 0;
  const char* at_;
  int64_t step_, left_;
};

constexpr int kTogether = 4;  // vectors of columns side by side

// part[j] += query . key j, over some vectors of columns: key by key, as they lie in memory.
template <int vectors, class Stored, class Lanes>
RECMAS_ALWAYS_INLINE void add_products(const float* query, const Stored* keys, const int64_t (&at)[kWidth], Lanes lanes,
                                       Vec (&part)[kWidth]) {
  Vec q[vectors];
  for (int v = 0; v < vectors; ++v) q[v] = load(query + v * kWidth, lanes);
  for (int j = 0; j < kWidth; ++j) {
    for (int v = 0; v < vectors; ++v) part[j] = fma(q[v], load(keys + at[j] + v * kWidth, lanes), part[j]);
  }
}

// scores[t] = query . key t for one vector of positions; what lies beyond the last position repeats it.
template <class Stored>
void score(const float* query, const Stored* keys, int64_t stride, int64_t columns, int64_t last, float* scores) {
  int64_t at[kWidth];
  for (int j = 0; j < kWidth; ++j) at[j] = smaller(j, last) * stride;
  Vec part[kWidth];
  for (int j = 0; j < kWidth; ++j) part[j] = set1(0.0f);
  int64_t c = 0;
  for (; c + kTogether * kWidth <= columns; c += kTogether * kWidth) {
    add_products<kTogether>(query + c, keys + c, at, Whole{}, part);
  }
  each_vector(columns - c,
              [&](int64_t i, auto lanes) { add_products<1>(query + c + i, keys + c + i, at, lanes, part); });
  transpose(part);
  for (int j = 1; j < kWidth; ++j) part[0] = add(part[0], part[j]);
  store(scores, part[0]);
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

constexpr int64_t kSummed = 16;  // positions at a time: even

// even[c] and odd[c] += the weights[t] values[t][c] of even and of odd t, for some vectors of columns: two chains of
// sums, so that an addition need not wait for the one before.
template <int vectors, class Stored, class Lanes>
inline void add_values(const float* weights, const Stored* values, int64_t stride, int64_t positions, float* even_sums,
                       float* odd_sums, Lanes lanes) {
  Vec even[vectors], odd[vectors];
  for (int v = 0; v < vectors; ++v) {
    even[v] = load(even_sums + v * kWidth, lanes);
    odd[v] = load(odd_sums + v * kWidth, lanes);
  }
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
  for (int v = 0; v < vectors; ++v) {
    store(even_sums + v * kWidth, even[v], lanes);
    store(odd_sums + v * kWidth, odd[v], lanes);
  }
}

constexpr int64_t kHeads = 8;  // side by side at most

// Of each head.
constexpr int64_t attention_floats(int64_t positions, int64_t columns) {
  return score_floats(positions) + 2 * round_up(columns, kWidth);
}

// out [heads][columns] of so many queries, kHeads at most, over the same keys and values [positions][columns]. room:
// attention_floats for each head.
template <class Stored>
void attend(const float* queries, int64_t heads, const Stored* keys, int64_t key_stride, const Stored* values,
            int64_t value_stride, int64_t columns, int64_t positions, const uint8_t* mask, CacheAhead& ahead,
            float* room, float* out) {
  const int64_t width = round_up(columns, kWidth), line = attention_floats(positions, columns);
  for (int64_t t = 0; t < positions; t += kWidth) {
    ahead.ask(smaller(kWidth, positions - t));
    for (int64_t h = 0; h < heads; ++h) {
      score(queries + h * columns, keys + t * key_stride, key_stride, columns, positions - 1 - t, room + h * line + t);
    }
  }
  float scales[kHeads];
  for (int64_t h = 0; h < heads; ++h) {
    float* const sums = room + h * line + score_floats(positions);
    scales[h] = weigh(room + h * line, positions, mask);
    for (int64_t c = 0; c < 2 * width; c += kWidth) store(sums + c, set1(0.0f));
  }
  for (int64_t t = 0; t < positions; t += kSummed) {
    const int64_t count = smaller(kSummed, positions - t);
    ahead.ask(count);
    for (int64_t h = 0; h < heads; ++h) {
      const float* const weights = room + h * line + t;
      float *const even = room + h * line + score_floats(positions), *const odd = even + width;
      const Stored* const at = values + t * value_stride;
      int64_t c = 0;
      for (; c + kTogether * kWidth <= columns; c += kTogether * kWidth) {
        add_values<kTogether>(weights, at + c, value_stride, count, even + c, odd + c, Whole{});
      }
      each_vector(columns - c, [&](int64_t i, auto lanes) {
        add_values<1>(weights, at + c + i, value_stride, count, even + c + i, odd + c + i, lanes);
      });
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    const float *const even = room + h * line + score_floats(positions), *const odd = even + width;
    each_vector(columns, [&](int64_t c, auto lanes) {
      store(out + h * columns + c, mul(add(load(even + c, lanes), load(odd + c, lanes)), set1(scales[h])), lanes);
    });
  }
}

}  // namespace recmas::cpu::RECMAS_ISA
