// One position of a decoder layer on CPU tensors: what comes before its attention over the cache, and the rest.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "frozen_operands.h"

namespace recmas::python {

namespace {

struct LayerArguments {
  Arguments arguments;
  Isa isa;
  int32_t threads;
  Operands operands;

  LayerArguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* entry)
      : arguments(values, count, expected, entry),
        isa(static_cast<Isa>(arguments.integer())),
        threads(static_cast<int32_t>(arguments.integer())) {}

  // Of one layer among several.
  LayerArguments(PyObject* tuple, Py_ssize_t expected, Isa isa, int32_t threads)
      : arguments(&PyTuple_GET_ITEM(tuple, 0), PyTuple_GET_SIZE(tuple), expected, "decoder_layers: a layer"),
        isa(isa),
        threads(threads) {}

  // gain or None, offset, eps
  cpu::RmsGain norm(int64_t features, const char* name) {
    cpu::RmsGain norm{operands.vector(arguments.object(), features, name), 0.0f, 0.0f};
    norm.offset = arguments.number();
    norm.eps = arguments.number();
    return norm;
  }

  // panels, stored dtype, bias or None
  cpu::FrozenWeight weight(int64_t out, int64_t in, const char* name) {
    PyObject* const panels = arguments.object();
    const auto stored = static_cast<Dtype>(arguments.integer());
    return {panels_of(panels, out, in, stored, isa), stored, operands.vector(arguments.object(), out, name)};
  }

  // Dense rows, so that what is read of them is what their shape says.
  MatrixView rows(int64_t* count) {
    const View view = Operands::described(arguments.object(), "x");
    operands.require(view.dense);
    return rows_of(view, count);
  }

  // [rows or 1, ..., features], dense.
  MatrixView angles(const View& view, int64_t rows, int64_t features, const char* name) {
    operands.require(view.dense && view.dtype != View::kOther);
    const bool one = view.elements == features;
    Operands::expect(view.columns == features && (one || view.elements == rows * features), name);
    return {view.data, one ? 0 : features, view.kernel_dtype()};
  }

  Output result(int64_t elements, const char* name) {
    const View view = Operands::described(arguments.object(), name);
    Operands::expect(view.dense && view.elements == elements && view.dtype != View::kOther, name);
    return {view.data, view.kernel_dtype()};
  }

  float* floats(int64_t elements, const char* name) {
    const Output found = result(elements, name);
    if (found.dtype != Dtype::f32) throw py::type_error(std::string(name) + " is not float32");
    return static_cast<float*>(found.data);
  }

  cpu::CacheView cache(int64_t rows, int64_t heads, int64_t features, int64_t* positions, const char* name) {
    const View view = Operands::described(arguments.object(), name);
    Operands::expect(view.dimensions == 4 && view.sizes[0] == rows && view.sizes[1] == heads &&
                         view.sizes[3] == features && (*positions < 0 || view.sizes[2] == *positions),
                     name);
    operands.require(view.dtype != View::kOther && view.has_dense_rows());
    *positions = view.sizes[2];
    return {view.data, view.strides[0], view.strides[1], view.strides[2], view.kernel_dtype()};
  }

  template <class Call>
  void sizes(Call& call) {
    call.isa = isa;
    call.threads = threads;
    call.heads = arguments.integer();
    call.key_heads = arguments.integer();
    call.head_features = arguments.integer();
  }

  void weights(cpu::LayerInputs& call) {
    const int64_t queries = call.heads * call.head_features, keys = call.key_heads * call.head_features;
    call.norm = norm(call.features, "norm");
    call.query = weight(queries, call.features, "query");
    call.key = weight(keys, call.features, "key");
    call.value = weight(keys, call.features, "value");
    call.query_norm = norm(call.head_features, "query_norm");
    call.key_norm = norm(call.head_features, "key_norm");
  }

  void turns(cpu::LayerInputs& call, const View& cos, const View& sin) {
    call.cos = angles(cos, call.rows, call.head_features, "cos");
    call.sin = angles(sin, call.rows, call.head_features, "sin");
    operands.require(call.cos.dtype == call.sin.dtype && call.cos.stride == call.sin.stride);
  }

  void cached(cpu::LayerOutput& call) {
    call.positions = -1;
    call.keys = cache(call.rows, call.key_heads, call.head_features, &call.positions, "keys");
    call.values = cache(call.rows, call.key_heads, call.head_features, &call.positions, "values");
    operands.require(call.keys.dtype == call.values.dtype);
  }

  void masked(cpu::LayerOutput& call, const View& view) {
    const int64_t rows = view.dimensions == 4 ? view.sizes[0] : 0;
    Operands::expect(view.dimensions == 4 && (rows == call.rows || rows == 1) && view.sizes[1] == 1 &&
                         view.sizes[2] == 1 && view.sizes[3] == call.positions && view.element_bytes == 1,
                     "mask");
    operands.require(view.has_dense_rows());
    call.mask = static_cast<const uint8_t*>(view.data);
    call.mask_stride = rows == 1 ? 0 : view.strides[0];
  }

  void weights(cpu::LayerOutput& call) {
    call.out = weight(call.features, call.heads * call.head_features, "out");
    call.after_attention = norm(call.features, "after_attention");
    call.before_feed = norm(call.features, "before_feed");
    call.gate = weight(call.hidden_features, call.features, "gate");
    call.up = weight(call.hidden_features, call.features, "up");
    call.down = weight(call.features, call.hidden_features, "down");
    call.after_feed = norm(call.features, "after_feed");
  }
};

cpu::HeadRows dense_heads(const Output& heads, const cpu::LayerInputs& call) {
  return {heads.data, call.key_heads * call.head_features, call.head_features, heads.dtype};
}

// What layers are given besides their rows.
struct Given {
  View cos, sin, mask;
  bool has_mask;
};

std::vector<Given> given_of(PyObject* tuple) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) % 3 != 0) {
    throw py::type_error("decoder_layers: expected cosines, sines and masks in a row");
  }
  std::vector<Given> all(static_cast<size_t>(PyTuple_GET_SIZE(tuple) / 3));
  for (size_t i = 0; i < all.size(); ++i) {
    PyObject* const* const items = &PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(3 * i));
    all[i].cos = Operands::described(items[0], "cos");
    all[i].sin = Operands::described(items[1], "sin");
    all[i].has_mask = items[2] != Py_None;
    if (all[i].has_mask) all[i].mask = Operands::described(items[2], "mask");
  }
  return all;
}

// Where the last position of a cache stands.
cpu::HeadRows last_of(const cpu::CacheView& cache, int64_t positions) {
  const int64_t before = (positions - 1) * cache.position_stride * dtype_bytes(cache.dtype);
  return {static_cast<char*>(const_cast<void*>(cache.data)) + before, cache.row_stride, cache.head_stride, cache.dtype};
}

}  // namespace

// layer_inputs(isa, threads, heads, key heads, features of a head, scale, x, norm, query, key, value, query norm,
// key norm, cos, sin, queries, keys, values) -> whether all could be read, so that queries, keys and values were
// written. A norm is (gain or None, offset, eps), a weight (panels, stored dtype, bias or None), both in a row.
PyObject* layer_inputs(PyObject* const* values, Py_ssize_t count) {
  LayerArguments in(values, count, 30, "layer_inputs");
  cpu::LayerInputs call{};
  in.sizes(call);
  call.scale = in.arguments.number();
  call.x = in.rows(&call.rows);
  if (call.x.data == nullptr) Py_RETURN_FALSE;
  call.features = call.x.stride;
  in.weights(call);
  const View cos = Operands::described(in.arguments.object(), "cos");
  in.turns(call, cos, Operands::described(in.arguments.object(), "sin"));
  const int64_t keys = call.rows * call.key_heads * call.head_features;
  call.queries = in.floats(call.rows * call.heads * call.head_features, "queries");
  call.keys = dense_heads(in.result(keys, "keys"), call);
  call.values = dense_heads(in.result(keys, "values"), call);
  if (!in.operands.readable) Py_RETURN_FALSE;
  run_in(cpu::layer_inputs_workspace(call), "layer_inputs",
         [&](void* workspace, int64_t bytes) { return cpu::layer_inputs(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// layer_output(isa, threads, heads, key heads, features of a head, hidden features, activation, x, queries, keys,
// values, mask or None, out, norm after attention, norm before the feed-forward part, gate, up, down, norm after it, y)
// -> whether all could be read, so that y was written. Norms and weights as above.
PyObject* layer_output(PyObject* const* values, Py_ssize_t count) {
  LayerArguments in(values, count, 34, "layer_output");
  cpu::LayerOutput call{};
  in.sizes(call);
  call.hidden_features = in.arguments.integer();
  call.activation = static_cast<cpu::Activation>(in.arguments.integer());
  call.x = in.rows(&call.rows);
  if (call.x.data == nullptr) Py_RETURN_FALSE;
  call.features = call.x.stride;
  call.queries = in.floats(call.rows * call.heads * call.head_features, "queries");
  in.cached(call);
  PyObject* const mask = in.arguments.object();
  if (mask != Py_None) in.masked(call, Operands::described(mask, "mask"));
  in.weights(call);
  call.y = in.result(call.rows * call.features, "y");
  if (!in.operands.readable) Py_RETURN_FALSE;
  run_in(cpu::layer_output_workspace(call), "layer_output",
         [&](void* workspace, int64_t bytes) { return cpu::layer_output(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// decoder_layers(isa, threads, x, y, queries, given, positions, layers) -> whether all could be read, so that y and the
// last position of every layer's keys and values were written: of so many, or of all that they have room for if -1.
// Given are cos, sin and mask or None, three in a row. A layer: (heads, key heads, features of a head, hidden features,
// activation, scale, then as above norm, query, key, value, query norm, key norm, which of the given, keys, values, and
// from out to the norm after the feed-forward part).
PyObject* decoder_layers(PyObject* const* values, Py_ssize_t count) {
  LayerArguments in(values, count, 8, "decoder_layers");
  int64_t rows = 0;
  MatrixView x = in.rows(&rows);
  if (x.data == nullptr) Py_RETURN_FALSE;
  const int64_t features = x.stride;
  const Output y = in.result(rows * features, "y");
  const View queries = Operands::described(in.arguments.object(), "queries");
  Operands::expect_float(queries, "queries");
  const std::vector<Given> all_given = given_of(in.arguments.object());
  const int64_t positions = in.arguments.integer();
  PyObject* const tuples = in.arguments.object();
  if (!PyTuple_Check(tuples)) throw py::type_error("decoder_layers: expected a tuple of layers");
  std::vector<cpu::DecoderLayer> layers(static_cast<size_t>(PyTuple_GET_SIZE(tuples)));
  bool readable = in.operands.readable && y.dtype == x.dtype;
  for (size_t i = 0; i < layers.size(); ++i) {
    PyObject* const tuple = PyTuple_GET_ITEM(tuples, static_cast<Py_ssize_t>(i));
    if (!PyTuple_Check(tuple)) throw py::type_error("decoder_layers: a layer is no tuple");
    LayerArguments of_layer(tuple, 48, in.isa, in.threads);
    auto& [inputs, output] = layers[i];
    of_layer.sizes(inputs);
    output.hidden_features = of_layer.arguments.integer();
    output.activation = static_cast<cpu::Activation>(of_layer.arguments.integer());
    inputs.scale = of_layer.arguments.number();
    inputs.rows = output.rows = rows;
    inputs.features = output.features = features;
    inputs.x = output.x = x;
    Operands::expect(queries.dense && queries.elements >= rows * inputs.heads * inputs.head_features, "queries");
    inputs.queries = static_cast<float*>(queries.data);
    output.queries = inputs.queries;
    output.isa = in.isa;
    output.threads = in.threads;
    output.heads = inputs.heads;
    output.key_heads = inputs.key_heads;
    output.head_features = inputs.head_features;
    of_layer.weights(inputs);
    const auto which = static_cast<size_t>(of_layer.arguments.integer());
    if (which >= all_given.size()) throw py::value_error("decoder_layers: a layer was given nothing");
    const Given& given = all_given[which];
    of_layer.turns(inputs, given.cos, given.sin);
    of_layer.cached(output);
    if (positions >= 0) {
      Operands::expect(positions > 0 && positions <= output.positions, "keys");
      output.positions = positions;
    }
    if (given.has_mask) of_layer.masked(output, given.mask);
    of_layer.weights(output);
    inputs.keys = last_of(output.keys, output.positions);
    inputs.values = last_of(output.values, output.positions);
    output.y = y;
    x = {y.data, features, y.dtype};
    readable = readable && of_layer.operands.readable;
  }
  if (!readable) Py_RETURN_FALSE;
  const auto layer_count = static_cast<int64_t>(layers.size());
  run_in(cpu::decoder_layers_workspace(layers.data(), layer_count), "decoder_layers",
         [&](void* workspace, int64_t bytes) {
           return cpu::decoder_layers(layers.data(), layer_count, workspace, bytes);
         });
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
