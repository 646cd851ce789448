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
  // stored: of the first weight, the third and so on; others: of the second and so on.
  LayerCase(const LayerShape& shape, Dtype stored, Dtype others, Dtype rows, Isa isa)
      : s_(shape), stored_{stored, others}, rows_(rows), isa_(isa) {}

  LayerResults run(int32_t inputs_threads, int32_t output_threads) {
    cpu::DecoderLayer layer = make();
    const int64_t element = dtype_bytes(rows_), keys = s_.key_heads * s_.head;
    const Guarded new_keys = workspace_of(s_.rows * keys * element),
                  new_values = workspace_of(s_.rows * keys * element);
    layer.inputs.keys = {new_keys.get(), keys, s_.head, rows_};
    layer.inputs.values = {new_values.get(), keys, s_.head, rows_};
    layer.inputs.threads = inputs_threads;
    layer.output.threads = output_threads;
    run_inputs(layer.inputs);
    run_output(layer.output);
    return {queries_.back().values(), widened(results_.back())};
  }

  // So many layers, each of what the one before it made; together or call by call.
  LayerResults run_layers(int count, int32_t threads, bool together) {
    std::vector<cpu::DecoderLayer> layers;
    for (int i = 0; i < count; ++i) {
      layers.push_back(make());
      cpu::DecoderLayer& layer = layers.back();
      layer.inputs.threads = layer.output.threads = threads;
      layer.inputs.keys = last_of(layer.output.keys);
      layer.inputs.values = last_of(layer.output.values);
      layer.output.y = layers.front().output.y;
      if (i > 0) layer.inputs.x = layer.output.x = {layer.output.y.data, s_.features, rows_};
    }
    if (together) {
      const int64_t bytes = cpu::decoder_layers_workspace(layers.data(), count);
      const Guarded workspace = workspace_of(bytes);
      CHECK(cpu::decoder_layers(layers.data(), count, workspace.get(), bytes) == Status::ok, "decoder_layers failed");
    } else {
      for (const cpu::DecoderLayer& layer : layers) {
        run_inputs(layer.inputs);
        run_output(layer.output);
      }
    }
    return {queries_.back().values(), widened(results_[results_.size() - static_cast<size_t>(count)])};
  }

 private:
  // A layer with weights, rows and caches of its own; keys and values are for the caller to place. All of it lives as
  // long as the case.
  cpu::DecoderLayer make() {
    const int64_t inner = s_.heads * s_.head, keys = s_.key_heads * s_.head;
    const int64_t row_stride = keys * s_.positions, head_stride = s_.head * s_.positions;
    const size_t elements = static_cast<size_t>(s_.rows * s_.features), angles = static_cast<size_t>(s_.rows * s_.head);
    const void* const x = rounded(elements, 1);
    const void *const cos = rounded(angles, 2), *const sin = rounded(angles, 3);
    const size_t cached = static_cast<size_t>(s_.rows * row_stride);
    const void *const held_keys = rounded(cached, 4), *const held_values = rounded(cached, 5);
    masks_.emplace_back(static_cast<size_t>(s_.rows * s_.positions), uint8_t{1});
    for (size_t i = 0; i < masks_.back().size(); i += 3) masks_.back()[i] = 0;
    queries_.emplace_back(static_cast<size_t>(s_.rows * inner) * sizeof(float));
    results_.emplace_back(elements * static_cast<size_t>(dtype_bytes(rows_)));
    const MatrixView rows{x, s_.features, rows_};
    return {{s_.rows,
             s_.features,
             s_.heads,
             s_.key_heads,
             s_.head,
             rows,
             norm(s_.features, 10),
             norm(s_.head, 11),
             norm(s_.head, 12),
             weight(inner, s_.features, 20),
             weight(keys, s_.features, 21),
             weight(keys, s_.features, 22),
             {cos, s_.head, rows_},
             {sin, s_.head, rows_},
             0.25f,
             queries_.back().data(),
             {},
             {},
             isa_,
             1},
            {s_.rows,
             s_.features,
             s_.hidden,
             s_.heads,
             s_.key_heads,
             s_.head,
             s_.positions,
             rows,
             queries_.back().data(),
             {held_keys, row_stride, head_stride, s_.head, rows_},
             {held_values, row_stride, head_stride, s_.head, rows_},
             masks_.back().data(),
             s_.positions,
             weight(s_.features, inner, 23),
             norm(s_.features, 13),
             norm(s_.features, 14),
             weight(s_.hidden, s_.features, 24),
             weight(s_.hidden, s_.features, 25),
             cpu::Activation::silu,
             weight(s_.features, s_.hidden, 26),
             norm(s_.features, 15),
             {results_.back().get(), rows_},
             isa_,
             1}};
  }

  static void run_inputs(const cpu::LayerInputs& call) {
    const int64_t bytes = cpu::layer_inputs_workspace(call);
    const Guarded workspace = workspace_of(bytes);
    CHECK(cpu::layer_inputs(call, workspace.get(), bytes) == Status::ok, "layer_inputs failed");
  }
  static void run_output(const cpu::LayerOutput& call) {
    const int64_t bytes = cpu::layer_output_workspace(call);
    const Guarded workspace = workspace_of(bytes);
    CHECK(cpu::layer_output(call, workspace.get(), bytes) == Status::ok, "layer_output failed");
  }

  cpu::HeadRows last_of(const cpu::CacheView& cache) const {
    const int64_t before = (s_.positions - 1) * cache.position_stride * dtype_bytes(cache.dtype);
    return {static_cast<char*>(const_cast<void*>(cache.data)) + before, cache.row_stride, cache.head_stride,
            cache.dtype};
  }

  const void* rounded(size_t count, unsigned seed) {
    rounded_.emplace_back(random_values(count, seed), rows_);
    return rounded_.back().data();
  }
  cpu::FrozenWeight weight(int64_t out, int64_t in, unsigned seed) {
    const Dtype stored = stored_[seed % 2];
    const Rounded values(random_values(static_cast<size_t>(out * in), seed, 1.0f / std::sqrt(static_cast<float>(in))),
                         stored);
    kept_.emplace_back(static_cast<size_t>(cpu::packed_bytes(out, in, stored, isa_)));
    CHECK(cpu::pack_weight({values.data(), stored}, out, in, kept_.back().get(), stored, isa_, 1) == Status::ok,
          "not packed");
    floats_.push_back(random_values(static_cast<size_t>(out), seed + 100));
    return {kept_.back().get(), stored, {floats_.back().data(), Dtype::f32}};
  }
  cpu::RmsGain norm(int64_t features, unsigned seed) {
    floats_.push_back(random_values(static_cast<size_t>(features), seed));
    return {{floats_.back().data(), Dtype::f32}, 1.0f, 1e-6f};
  }
  std::vector<float> widened(const Guarded& y) const {
    std::vector<float> values(static_cast<size_t>(s_.rows * s_.features));
    for (size_t i = 0; i < values.size(); ++i) {
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
  Dtype stored_[2], rows_;
  Isa isa_;
  std::deque<Guarded> kept_, queries_, results_;
  std::deque<std::vector<float>> floats_;
  std::deque<Rounded> rounded_;
  std::deque<std::vector<uint8_t>> masks_;
};

}  // namespace recmas::tests
