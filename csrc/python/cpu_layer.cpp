// One position of a decoder layer on CPU tensors: what comes before its attention over the cache, and the rest.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "frozen_operands.h"

namespace recmas::python {

namespace {

struct LayerArguments {
  Arguments arguments;
  Operands operands;
  Isa isa;
  int32_t threads;

  LayerArguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* entry)
      : arguments(values, count, expected, entry),
        isa(static_cast<Isa>(arguments.integer())),
        threads(static_cast<int32_t>(arguments.integer())) {}

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
  MatrixView angles(int64_t rows, int64_t features, const char* name) {
    const View view = Operands::described(arguments.object(), name);
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
};

}  // namespace

// layer_inputs(isa, threads, heads, key heads, features of a head, scale, x, norm, query, key, value, query norm,
// key norm, cos, sin, queries, keys, values) -> whether all could be read, so that queries, keys and values were
// written. A norm is (gain or None, offset, eps), a weight (panels, stored dtype, bias or None), both in a row.
PyObject* layer_inputs(PyObject* const* values, Py_ssize_t count) {
  LayerArguments in(values, count, 30, "layer_inputs");
  cpu::LayerInputs call{};
  call.isa = in.isa;
  call.threads = in.threads;
  call.heads = in.arguments.integer();
  call.key_heads = in.arguments.integer();
  call.head_features = in.arguments.integer();
  call.scale = in.arguments.number();
  call.x = in.rows(&call.rows);
  if (call.x.data == nullptr) Py_RETURN_FALSE;
  call.features = call.x.stride;
  const int64_t queries = call.heads * call.head_features, keys = call.key_heads * call.head_features;
  call.norm = in.norm(call.features, "norm");
  call.query = in.weight(queries, call.features, "query");
  call.key = in.weight(keys, call.features, "key");
  call.value = in.weight(keys, call.features, "value");
  call.query_norm = in.norm(call.head_features, "query_norm");
  call.key_norm = in.norm(call.head_features, "key_norm");
  call.cos = in.angles(call.rows, call.head_features, "cos");
  call.sin = in.angles(call.rows, call.head_features, "sin");
  in.operands.require(call.cos.dtype == call.sin.dtype && call.cos.stride == call.sin.stride);
  call.queries = in.floats(call.rows * queries, "queries");
  call.keys = in.result(call.rows * keys, "keys");
  call.values = in.result(call.rows * keys, "values");
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
  call.isa = in.isa;
  call.threads = in.threads;
  call.heads = in.arguments.integer();
  call.key_heads = in.arguments.integer();
  call.head_features = in.arguments.integer();
  call.hidden_features = in.arguments.integer();
  call.activation = static_cast<cpu::Activation>(in.arguments.integer());
  call.x = in.rows(&call.rows);
  if (call.x.data == nullptr) Py_RETURN_FALSE;
  call.features = call.x.stride;
  const int64_t inner = call.heads * call.head_features;
  call.queries = in.floats(call.rows * inner, "queries");
  call.positions = -1;
  call.keys = in.cache(call.rows, call.key_heads, call.head_features, &call.positions, "keys");
  call.values = in.cache(call.rows, call.key_heads, call.head_features, &call.positions, "values");
  in.operands.require(call.keys.dtype == call.values.dtype);
  if (PyObject* const mask = in.arguments.object(); mask != Py_None) {
    const View view = Operands::described(mask, "mask");
    const int64_t rows = view.dimensions == 4 ? view.sizes[0] : 0;
    Operands::expect(view.dimensions == 4 && (rows == call.rows || rows == 1) && view.sizes[1] == 1 &&
                         view.sizes[2] == 1 && view.sizes[3] == call.positions && view.element_bytes == 1,
                     "mask");
    in.operands.require(view.has_dense_rows());
    call.mask = static_cast<const uint8_t*>(view.data);
    call.mask_stride = rows == 1 ? 0 : view.strides[0];
  }
  call.out = in.weight(call.features, inner, "out");
  call.after_attention = in.norm(call.features, "after_attention");
  call.before_feed = in.norm(call.features, "before_feed");
  call.gate = in.weight(call.hidden_features, call.features, "gate");
  call.up = in.weight(call.hidden_features, call.features, "up");
  call.down = in.weight(call.features, call.hidden_features, "down");
  call.after_feed = in.norm(call.features, "after_feed");
  call.y = in.result(call.rows * call.features, "y");
  if (!in.operands.readable) Py_RETURN_FALSE;
  run_in(cpu::layer_output_workspace(call), "layer_output",
         [&](void* workspace, int64_t bytes) { return cpu::layer_output(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
