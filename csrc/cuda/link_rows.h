// LayerNorm of a few rows, one block each: what the first product reads and what leaves behind the second.
// Written over a Thread (thread.h on the device, an emulation in csrc/tests), so that the host can run it too.
#pragma once

#include "link_plan.h"

namespace recmas::cuda {

// The sum over the block, for every thread, always added in the same order.
template <class Thread>
RECMAS_ANYWHERE float block_sum(Thread& thread, float value) {
  float* partial = reinterpret_cast<float*>(thread.shared());
  for (int mask = 16; mask > 0; mask /= 2) value += thread.shuffle_xor(value, mask);
  thread.sync();  // of the sum before this one, every thread has read the partial sums
  if (thread.index() % 32 == 0) partial[thread.index() / 32] = value;
  thread.sync();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// What a thread holds of a row at once: every 256th element, so that all of a row of 4096 is on its way before the
// first element is used. Wider rows are read again in such chunks.
constexpr int kKept = 16;
constexpr int64_t kChunk = kKept * kThreads;
struct Kept {
  float values[kKept];  // until `decode`: the element's own bits, the lowest of the float's
};

template <class Element, class Thread>
RECMAS_ANYWHERE void read_as(Thread& thread, const void* data, int64_t begin, int64_t end, Kept& kept) {
  RECMAS_UNROLL
  for (int i = 0; i < kKept; ++i) {
    const int64_t at = begin + i * kThreads + thread.index();
    kept.values[i] = at < end ? bits_as<float>(thread.load_bits(static_cast<const Element*>(data) + at)) : 0.0f;
  }
}

template <class Element>
RECMAS_ANYWHERE void decode_as(Kept& kept) {
  RECMAS_UNROLL
  for (int i = 0; i < kKept; ++i) {
    kept.values[i] = to_float(Element{static_cast<uint16_t>(bits_as<uint32_t>(kept.values[i]))});
  }
}

// Turns what was read into numbers. Apart from the reading, so that nothing waits for one array before the next is
// on its way.
RECMAS_ANYWHERE void decode(Kept& kept, Dtype dtype) {
  if (dtype == Dtype::bf16) decode_as<Bf16>(kept);
  if (dtype == Dtype::f16) decode_as<F16>(kept);
}

// This thread's elements of data[begin, end), zero beyond the end.
template <class Thread>
RECMAS_ANYWHERE void read(Thread& thread, const void* data, Dtype dtype, int64_t begin, int64_t end, Kept& kept) {
  if (dtype == Dtype::f32) {
    read_as<float>(thread, data, begin, end, kept);
  } else if (dtype == Dtype::bf16) {
    read_as<Bf16>(thread, data, begin, end, kept);
  } else {
    read_as<F16>(thread, data, begin, end, kept);
  }
}

template <class Thread>
RECMAS_ANYWHERE void run_rows(Thread& thread, const Rows& rows) {
  const int64_t token = thread.block(), start = token * rows.source.stride;
  const bool norms = rows.gain.data != nullptr, whole = rows.width <= kChunk;
  Kept gains{}, biases{}, kept;
  const auto read_parameters = [&](int64_t column) {
    if (norms) read(thread, rows.gain.data, rows.gain.dtype, column, rows.width, gains);
    if (norms && rows.bias.data != nullptr) {
      read(thread, rows.bias.data, rows.bias.dtype, column, rows.width, biases);
    }
  };
  const auto read_row = [&](int64_t column) {
    read(thread, rows.source.data, rows.source.dtype, start + column, start + rows.width, kept);
  };
  const auto decode_row = [&] {
    decode(kept, rows.source.dtype);
    RECMAS_UNROLL
    for (int i = 0; i < kKept; ++i) kept.values[i] = round_to(rows.rounded, kept.values[i]);
  };
  const auto decode_parameters = [&] {
    if (norms) decode(gains, rows.gain.dtype);
    if (norms && rows.bias.data != nullptr) decode(biases, rows.bias.dtype);
  };
  // Sums f(value) over the row; of what lies beyond its end f is not asked.
  const auto sum = [&](auto f) {
    float partial = 0.0f;
    for (int64_t column = 0; column < rows.width; column += kChunk) {
      if (!whole) {
        read_row(column);
        decode_row();
      }
      RECMAS_UNROLL
      for (int i = 0; i < kKept; ++i) {
        if (column + i * kThreads + thread.index() < rows.width) partial += f(kept.values[i]);
      }
    }
    return block_sum(thread, partial);
  };

  thread.start_dependents();
  if (whole) read_parameters(0);
  if (rows.overlaps) thread.wait_for_previous();
  if (whole) {
    read_row(0);
    decode_row();
    decode_parameters();
  }
  float mean = 0.0f, rstd = 0.0f;
  if (norms) {
    const float share = 1.0f / static_cast<float>(rows.width);
    mean = sum([](float value) { return value; }) * share;
    rstd = 1.0f / sqrtf(sum([mean](float value) { return (value - mean) * (value - mean); }) * share + rows.eps);
    if (rows.mean != nullptr && thread.index() == 0) {
      thread.store(rows.mean, Dtype::f32, token, mean);
      thread.store(rows.rstd, Dtype::f32, token, rstd);
    }
  }
  for (int64_t first = 0; first < rows.columns; first += kChunk) {
    if (!whole) {
      read_parameters(first);
      read_row(first);
      decode_row();
      decode_parameters();
    }
    RECMAS_UNROLL
    for (int i = 0; i < kKept; ++i) {
      const int64_t column = first + i * kThreads + thread.index();
      if (column >= rows.columns) continue;
      const int64_t place = token * rows.stride + column;
      if (rows.copy.data != nullptr) thread.store(rows.copy.data, rows.copy.dtype, place, kept.values[i]);
      if (rows.normalised.data != nullptr) {
        // Beyond the row, gain and bias are zero; a row that is not finite must not make NaN of them.
        const float normalised = (kept.values[i] - mean) * rstd * gains.values[i] + biases.values[i];
        thread.store(rows.normalised.data, rows.normalised.dtype, place, column < rows.width ? normalised : 0.0f);
      }
    }
  }
}

}  // namespace recmas::cuda
