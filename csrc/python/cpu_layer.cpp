// One position of a decoder layer on CPU tensors: what comes before its attention over the cache, and the rest.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "layer_arguments.h"

namespace recmas::python {

namespace {

cpu::HeadRows dense_heads(const Output& heads, const cpu::LayerInputs& call) {
  return {heads.data, call.key_heads * call.head_features, call.head_features, heads.dtype};
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

}  // namespace recmas::python
