// One position of all layers of a decoder on CPU tensors. Layers are read once and hold for many calls.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../link.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "layer_arguments.h"

namespace recmas::python {

namespace {

// Layers as Python gave them: sizes, and addresses of panels, keys and values, which nobody moves while these tensors
// live. Gains and biases are parameters, whose memory may be another at every call.
struct DecoderLayers {
  py::object tuples;  // holds the tensors
  Isa isa;
  int64_t rows, features;
  bool readable = true;
  std::vector<cpu::DecoderLayer> layers;
  std::vector<size_t> given;  // of each layer, the number of what it is given
  std::vector<ReadVector> vectors;
};

constexpr const char* kName = "recmas_kernels.decoder_layers";

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

// Of x's dtype, as the kernels take them.
bool read_vectors(const std::vector<ReadVector>& vectors, Dtype dtype) {
  bool readable = true;
  for (const auto& [object, place, length, name] : vectors) {
    const View view = Operands::described(object, name);
    Operands::expect(view.is_vector(length), name);
    readable = readable && view.is_contiguous() && view.dtype == static_cast<int32_t>(dtype);
    *place = {view.data, view.kernel_dtype()};
  }
  return readable;
}

void read_layer(PyObject* tuple, DecoderLayers& all, cpu::DecoderLayer& layer) {
  if (!PyTuple_Check(tuple)) throw py::type_error("decoder_layers: a layer is no tuple");
  LayerArguments in(tuple, 48, all.isa, &all.vectors);
  auto& [inputs, output] = layer;
  in.sizes(inputs);
  output.hidden_features = in.arguments.integer();
  output.activation = static_cast<cpu::Activation>(in.arguments.integer());
  inputs.scale = in.arguments.number();
  inputs.rows = output.rows = all.rows;
  inputs.features = output.features = all.features;
  output.isa = all.isa;
  output.heads = inputs.heads;
  output.key_heads = inputs.key_heads;
  output.head_features = inputs.head_features;
  in.weights(inputs);
  all.given.push_back(static_cast<size_t>(in.arguments.integer()));
  in.cached(output);
  in.weights(output);
  all.readable = all.readable && in.operands.readable;
}

}  // namespace

// read_decoder_layers(isa, rows, features, layers) -> what decoder_layers takes, for rows of so many features. A layer:
// (heads, key heads, features of a head, hidden features, activation, scale, then as in cpu_layer.cpp norm, query, key,
// value, query norm, key norm, which of the given, keys, values, and from out to the norm after the feed-forward part).
PyObject* read_decoder_layers(PyObject* const* values, Py_ssize_t count) {
  Arguments in(values, count, 4, "read_decoder_layers");
  auto all = std::make_unique<DecoderLayers>();
  all->isa = static_cast<Isa>(in.integer());
  all->rows = in.integer();
  all->features = in.integer();
  all->tuples = py::reinterpret_borrow<py::object>(in.object());
  PyObject* const tuples = all->tuples.ptr();
  if (!PyTuple_Check(tuples)) throw py::type_error("read_decoder_layers: expected a tuple of layers");
  all->layers.resize(static_cast<size_t>(PyTuple_GET_SIZE(tuples)));
  for (size_t i = 0; i < all->layers.size(); ++i) {
    read_layer(PyTuple_GET_ITEM(tuples, static_cast<Py_ssize_t>(i)), *all, all->layers[i]);
  }
  const auto forget = [](PyObject* capsule) {
    delete static_cast<DecoderLayers*>(PyCapsule_GetPointer(capsule, kName));
  };
  PyObject* const capsule = PyCapsule_New(all.get(), kName, forget);
  if (capsule != nullptr) static_cast<void>(all.release());
  return capsule;
}

// decoder_layers(isa, threads, x, y, queries, given, positions, gain, offset, eps, layers) -> whether all could be
// read, so that y and the last position of every layer's keys and values were written: of so many, or of all that they
// have room for if -1. Given are cos, sin and mask or None, three in a row. With a gain, y is what its norm makes of
// what the last layer returns. Layers are what read_decoder_layers returned.
PyObject* decoder_layers(PyObject* const* values, Py_ssize_t count) {
  LayerArguments in(values, count, 11, "decoder_layers");
  int64_t rows = 0;
  MatrixView x = in.rows(&rows);
  if (x.data == nullptr) Py_RETURN_FALSE;
  const int64_t features = x.stride;
  const Output y = in.result(rows * features, "y");
  const View queries = Operands::described(in.arguments.object(), "queries");
  Operands::expect_float(queries, "queries");
  const std::vector<Given> given = given_of(in.arguments.object());
  const int64_t positions = in.arguments.integer();
  cpu::RmsGain last;
  in.norm(last, features, "gain");
  auto* const all = static_cast<DecoderLayers*>(PyCapsule_GetPointer(in.arguments.object(), kName));
  if (all == nullptr) throw py::error_already_set();
  Operands::expect(rows == all->rows && features == all->features, "x");
  const bool vectors = read_vectors(all->vectors, x.dtype);
  bool readable = vectors && all->readable && all->isa == in.isa && in.operands.readable && y.dtype == x.dtype;
  std::vector<cpu::DecoderLayer> layers = all->layers;  // its own: other threads go on when the kernels run
  for (size_t i = 0; i < layers.size(); ++i) {
    auto& [inputs, output] = layers[i];
    inputs.x = output.x = x;
    inputs.threads = output.threads = in.threads;
    Operands::expect(queries.dense && queries.elements >= rows * inputs.heads * inputs.head_features, "queries");
    inputs.queries = static_cast<float*>(queries.data);
    output.queries = inputs.queries;
    if (all->given[i] >= given.size()) throw py::value_error("decoder_layers: a layer was given nothing");
    const auto& [cos, sin, mask, has_mask] = given[all->given[i]];
    in.turns(inputs, cos, sin);
    if (positions >= 0) {
      Operands::expect(positions > 0 && positions <= output.positions, "keys");
      output.positions = positions;
    }
    if (has_mask) in.masked(output, mask);
    inputs.keys = last_of(output.keys, output.positions);
    inputs.values = last_of(output.values, output.positions);
    output.y = y;
    x = {y.data, features, y.dtype};
  }
  readable = readable && in.operands.readable;
  if (!readable) Py_RETURN_FALSE;
  const auto layer_count = static_cast<int64_t>(layers.size());
  run_in(cpu::decoder_layers_workspace(layers.data(), layer_count), "decoder_layers",
         [&](void* workspace, int64_t bytes) {
           const Status status = cpu::decoder_layers(layers.data(), layer_count, workspace, bytes);
           if (status != Status::ok || last.gain.data == nullptr) return status;
           return cpu::rms_norm({rows, features, x, last.gain, last.offset, last.eps, y, in.isa, in.threads});
         });
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
