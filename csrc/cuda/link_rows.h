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

template <class Thread>
RECMAS_ANYWHERE void run_rows(Thread& thread, const Rows& rows) {
  thread.start_dependents();
  if (rows.overlaps) thread.wait_for_previous();
  const int64_t token = thread.block();
  const auto read = [&](int64_t column) {
    return round_to(rows.rounded,
                    thread.load(rows.source.data, rows.source.dtype, token * rows.source.stride + column));
  };
  float mean = 0.0f, scale = 0.0f;
  if (rows.gain.data != nullptr) {
    const float share = 1.0f / static_cast<float>(rows.width);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t column = thread.index(); column < rows.width; column += kThreads) sum += read(column);
    mean = block_sum(thread, sum) * share;
    for (int64_t column = thread.index(); column < rows.width; column += kThreads) {
      const float centred = read(column) - mean;
      squares += centred * centred;
    }
    scale = 1.0f / sqrtf(block_sum(thread, squares) * share + rows.eps);
    if (rows.mean != nullptr && thread.index() == 0) {
      thread.store(rows.mean, Dtype::f32, token, mean);
      thread.store(rows.rstd, Dtype::f32, token, scale);
    }
  }
  for (int64_t column = thread.index(); column < rows.columns; column += kThreads) {
    const float value = column < rows.width ? read(column) : 0.0f;
    const int64_t place = token * rows.stride + column;
    if (rows.copy.data != nullptr) thread.store(rows.copy.data, rows.copy.dtype, place, value);
    if (rows.normalised.data != nullptr) {
      float normalised = 0.0f;
      if (column < rows.width) {
        normalised = (value - mean) * scale * thread.load(rows.gain.data, rows.gain.dtype, column);
        if (rows.bias.data != nullptr) normalised += thread.load(rows.bias.data, rows.bias.dtype, column);
      }
      thread.store(rows.normalised.data, rows.normalised.dtype, place, normalised);
    }
  }
}

}  // namespace recmas::cuda
