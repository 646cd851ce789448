// A position of a decoder layer for the native tests: random weights, all norms there are, buffers between guard bands.
#pragma once

#include <deque>

#include "link_case.h"

namespace recmas::tests {

struct LayerShape {
  int64_t rows, features, heads, key_heads, head, hidden, positions;
};

struct LayerResults {
  std::vector<float> queries, y;
};

class LayerCase {
 public:
  LayerCase(const LayerShape& shape, Dtype stored, Dtype rows, Isa isa)
      : s_(shape), stored_(stored), rows_(rows), isa_(isa) {}

  LayerResults run(int32_t inputs_threads, int32_t output_threads) {
    const int64_t inner = s_.heads * s_.head, keys = s_.key_heads * s_.head;
    const size_t elements = static_cast<size_t>(s_.rows * s_.features);
    const Rounded x(random_values(elements, 1), rows_);
    const Rounded cos(random_values(static_cast<size_t>(s_.rows * s_.head), 2), rows_);
    const Rounded sin(random_values(static_cast<size_t>(s_.rows * s_.head), 3), rows_);
    const size_t cached = static_cast<size_t>(s_.rows * keys * s_.positions);
    const Rounded held_keys(random_values(cached, 4), rows_), held_values(random_values(cached, 5), rows_);
    std::vector<uint8_t> mask(static_cast<size_t>(s_.rows * s_.positions), 1);
    for (size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
    const int64_t element = rows_ == Dtype::f32 ? 4 : 2;
    const Guarded queries = Guarded::floats(static_cast<size_t>(s_.rows * inner));
    const Guarded new_keys = workspace_of(s_.rows * keys * element),
                  new_values = workspace_of(s_.rows * keys * element);
    const Guarded y = workspace_of(static_cast<int64_t>(elements) * element);

    const cpu::LayerInputs inputs{s_.rows,
                                  s_.features,
                                  s_.heads,
                                  s_.key_heads,
                                  s_.head,
                                  {x.data(), s_.features, rows_},
                                  norm(s_.features, 10),
                                  norm(s_.head, 11),
                                  norm(s_.head, 12),
                                  weight(inner, s_.features, 20),
                                  weight(keys, s_.features, 21),
                                  weight(keys, s_.features, 22),
                                  {cos.data(), s_.head, rows_},
                                  {sin.data(), s_.head, rows_},
                                  0.25f,
                                  queries.data(),
                                  {new_keys.get(), rows_},
                                  {new_values.get(), rows_},
                                  isa_,
                                  inputs_threads};
    const int64_t bytes = cpu::layer_inputs_workspace(inputs);
    const Guarded workspace = workspace_of(bytes);
    CHECK(cpu::layer_inputs(inputs, workspace.get(), bytes) == Status::ok, "layer_inputs failed");

    const int64_t row_stride = keys * s_.positions, head_stride = s_.head * s_.positions;
    const cpu::LayerOutput output{s_.rows,
                                  s_.features,
                                  s_.hidden,
                                  s_.heads,
                                  s_.key_heads,
                                  s_.head,
                                  s_.positions,
                                  {x.data(), s_.features, rows_},
                                  queries.data(),
                                  {held_keys.data(), row_stride, head_stride, s_.head, rows_},
                                  {held_values.data(), row_stride, head_stride, s_.head, rows_},
                                  mask.data(),
                                  s_.positions,
                                  weight(s_.features, inner, 23),
                                  norm(s_.features, 13),
                                  norm(s_.features, 14),
                                  weight(s_.hidden, s_.features, 24),
                                  weight(s_.hidden, s_.features, 25),
                                  cpu::Activation::silu,
                                  weight(s_.features, s_.hidden, 26),
                                  norm(s_.features, 15),
                                  {y.get(), rows_},
                                  isa_,
                                  output_threads};
    const int64_t more_bytes = cpu::layer_output_workspace(output);
    const Guarded more = workspace_of(more_bytes);
    CHECK(cpu::layer_output(output, more.get(), more_bytes) == Status::ok, "layer_output failed");
    return {queries.values(), widened(y, elements)};
  }

 private:
  // Panels and gains live as long as the case.
  cpu::FrozenWeight weight(int64_t out, int64_t in, unsigned seed) {
    const Rounded values(random_values(static_cast<size_t>(out * in), seed, 1.0f / std::sqrt(static_cast<float>(in))),
                         stored_);
    kept_.emplace_back(static_cast<size_t>(cpu::packed_bytes(out, in, stored_, isa_)));
    CHECK(cpu::pack_weight({values.data(), stored_}, out, in, kept_.back().get(), stored_, isa_, 1) == Status::ok,
          "not packed");
    floats_.push_back(random_values(static_cast<size_t>(out), seed + 100));
    return {kept_.back().get(), stored_, {floats_.back().data(), Dtype::f32}};
  }
  cpu::RmsGain norm(int64_t features, unsigned seed) {
    floats_.push_back(random_values(static_cast<size_t>(features), seed));
    return {{floats_.back().data(), Dtype::f32}, 1.0f, 1e-6f};
  }
  std::vector<float> widened(const Guarded& y, size_t count) const {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) {
      if (rows_ == Dtype::f32) {
        values[i] = y.data()[i];
      } else {  // bf16
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(y.get())[i]) << 16;
        std::memcpy(&values[i], &bits, sizeof bits);
      }
    }
    return values;
  }

  LayerShape s_;
  Dtype stored_, rows_;
  Isa isa_;
  std::deque<Guarded> kept_;
  std::deque<std::vector<float>> floats_;
};

}  // namespace recmas::tests
