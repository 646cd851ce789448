// LayerNorm of a few rows, one block each: what the first product reads and what leaves behind the second.
// Written over a Thread (thread.h on the device, an emulation in csrc/tests), so that the host can run it too.
#pragma once

#include <type_traits>

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
constexpr int kChunk = kKept * kThreads;
struct Kept {
  float values[kKept];  // until `decode`: the element's own bits, the lowest of the float's
};

// This thread's elements of the `left` at data, zero beyond them.
template <class Element, class Thread>
RECMAS_ANYWHERE void read(Thread& thread, const void* data, int64_t begin, int left, Kept& kept) {
  const auto* own = static_cast<const Element*>(data) + begin + thread.index();
  RECMAS_UNROLL
  for (int i = 0; i < kKept; ++i) {
    const bool inside = i * kThreads + thread.index() < left;
    kept.values[i] = inside ? bits_as<float>(thread.load_bits(own + i * kThreads)) : 0.0f;
  }
}

// Turns what was read into numbers. Apart from the reading, so that nothing waits for one array before the next is
// on its way.
template <class Element>
RECMAS_ANYWHERE void decode(Kept& kept) {
  if constexpr (sizeof(Element) == 2) {
    RECMAS_UNROLL
    for (int i = 0; i < kKept; ++i) {
      kept.values[i] = to_float(Element{static_cast<uint16_t>(bits_as<uint32_t>(kept.values[i]))});
    }
  }
}

template <class Source, class Parameter, class Target, bool kWhole, class Thread>
RECMAS_ANYWHERE void run_rows(Thread& thread, const Rows& rows) {
  const int64_t token = thread.block();
  const auto width = static_cast<int>(rows.width);
  const bool norms = rows.gain.data != nullptr;
  Kept gains{}, biases{}, kept;
  const auto read_parameters = [&](int column) {
    if (norms) read<Parameter>(thread, rows.gain.data, column, width - column, gains);
    if (norms && rows.bias.data != nullptr) read<Parameter>(thread, rows.bias.data, column, width - column, biases);
  };
  const auto read_row = [&](int column) {
    read<Source>(thread, rows.source.data, token * rows.source.stride + column, width - column, kept);
  };
  const auto decode_row = [&] {
    decode<Source>(kept);
    if constexpr (!std::is_same_v<Source, Target>) {
      RECMAS_UNROLL
      for (int i = 0; i < kKept; ++i) {
        if (rows.rounds) kept.values[i] = to_float(from_float<Target>(kept.values[i]));
      }
    }
  };
  const auto decode_parameters = [&] {
    decode<Parameter>(gains);
    decode<Parameter>(biases);
  };
  // Sums f(value) over the row; of what lies beyond its end f is not asked.
  const auto sum = [&](auto f) {
    float partial = 0.0f;
    for (int column = 0; column < width; column += kChunk) {
      if constexpr (!kWhole) {
        read_row(column);
        decode_row();
      }
      RECMAS_UNROLL
      for (int i = 0; i < kKept; ++i) {
        if (column + i * kThreads + thread.index() < width) partial += f(kept.values[i]);
      }
    }
    return block_sum(thread, partial);
  };

  if (!rows.starts_late) thread.start_dependents();
  if constexpr (kWhole) read_parameters(0);
  if (rows.overlaps) thread.wait_for_previous();
  if constexpr (kWhole) {
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
  if (rows.starts_late) thread.start_dependents();
  for (int first = 0; first < width; first += kChunk) {
    if constexpr (!kWhole) {
      read_parameters(first);
      read_row(first);
      decode_row();
      decode_parameters();
    }
    RECMAS_UNROLL
    for (int i = 0; i < kKept; ++i) {
      const int column = first + i * kThreads + thread.index();
      if (column >= width) continue;
      const int64_t place = token * rows.width + column;
      if (rows.copy != nullptr) thread.store(rows.copy, dtype_of<Target>(), place, kept.values[i]);
      if (rows.normalised != nullptr) {
        const float normalised = (kept.values[i] - mean) * rstd * gains.values[i] + biases.values[i];
        thread.store(rows.normalised, dtype_of<Target>(), place, normalised);
      }
    }
  }
}

// act(source, parameter, target, whole) with values of the types that a kernel of rows is built for.
template <class Act>
auto with_rows_types(const Rows& rows, Act act) {
  return with_element(rows.target, [&](auto target) {
    const auto with_source = [&](auto source) {
      const auto with_parameter = [&](auto parameter) {
        return rows.width <= kChunk ? act(source, parameter, target, std::true_type{})
                                    : act(source, parameter, target, std::false_type{});
      };
      return rows.gain.data == nullptr || rows.gain.dtype == Dtype::f32 ? with_parameter(float{})
                                                                        : with_parameter(target);
    };
    return rows.source.dtype == Dtype::f32 ? with_source(float{}) : with_source(target);
  });
}

}  // namespace recmas::cuda
