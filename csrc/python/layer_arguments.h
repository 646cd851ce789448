// The arguments of calls about one position of decoder layers, read in order.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../link.h"
#include "arguments.h"
#include "frozen_operands.h"

namespace recmas::python {

// A gain or a bias, and where it was read to.
struct ReadVector {
  PyObject* object;
  VectorView* place;
  int64_t length;
  const char* name;
};

struct LayerArguments {
  Arguments arguments;
  Isa isa;
  int32_t threads;
  Operands operands;
  std::vector<ReadVector>* vectors = nullptr;  // where to note gains and biases, if anywhere

  LayerArguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* entry)
      : arguments(values, count, expected, entry),
        isa(static_cast<Isa>(arguments.integer())),
        threads(static_cast<int32_t>(arguments.integer())) {}

  // Of one layer among several.
  LayerArguments(PyObject* tuple, Py_ssize_t expected, Isa isa, std::vector<ReadVector>* vectors)
      : arguments(&PyTuple_GET_ITEM(tuple, 0), PyTuple_GET_SIZE(tuple), expected, "decoder_layers: a layer"),
        isa(isa),
        threads(1),
        vectors(vectors) {}

  void vector(VectorView& place, int64_t length, const char* name) {
    PyObject* const object = arguments.object();
    place = operands.vector(object, length, name);
    if (vectors != nullptr && object != Py_None) vectors->push_back({object, &place, length, name});
  }

  // gain or None, offset, eps
  void norm(cpu::RmsGain& norm, int64_t features, const char* name) {
    vector(norm.gain, features, name);
    norm.offset = arguments.number();
    norm.eps = arguments.number();
  }

  // panels, stored dtype, bias or None
  void weight(cpu::FrozenWeight& weight, int64_t out, int64_t in, const char* name) {
    PyObject* const panels = arguments.object();
    weight.stored = static_cast<Dtype>(arguments.integer());
    weight.panels = panels_of(panels, out, in, weight.stored, isa);
    vector(weight.bias, out, name);
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
    norm(call.norm, call.features, "norm");
    weight(call.query, queries, call.features, "query");
    weight(call.key, keys, call.features, "key");
    weight(call.value, keys, call.features, "value");
    norm(call.query_norm, call.head_features, "query_norm");
    norm(call.key_norm, call.head_features, "key_norm");
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
    weight(call.out, call.features, call.heads * call.head_features, "out");
    norm(call.after_attention, call.features, "after_attention");
    norm(call.before_feed, call.features, "before_feed");
    weight(call.gate, call.hidden_features, call.features, "gate");
    weight(call.up, call.hidden_features, call.features, "up");
    weight(call.down, call.features, call.hidden_features, "down");
    norm(call.after_feed, call.features, "after_feed");
  }
};

}  // namespace recmas::python
