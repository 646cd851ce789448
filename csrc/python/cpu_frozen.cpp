// Products of frozen weights, and RMSNorm, on CPU tensors.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "frozen_operands.h"
#include "operands.h"

namespace recmas::python {

// frozen_forward(isa, threads, stored dtype, x, panels or the weight as it lies, bias or None, y) -> whether x and the
// bias could be read, so that y was written.
PyObject* frozen_forward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 7, "frozen_forward");
  const Isa isa = static_cast<Isa>(arguments.integer());
  const auto threads = static_cast<int32_t>(arguments.integer());
  const auto stored = static_cast<Dtype>(arguments.integer());
  const View x = Operands::described(arguments.object(), "x");
  PyObject *const weight = arguments.object(), *const bias = arguments.object();
  const View y = Operands::described(arguments.object(), "y");
  cpu::FrozenForward call{0, x.columns, y.columns, {}, nullptr, {}, {}, stored, cpu::Form::packed, isa, threads};
  Operands operands;
  call.x = rows_of(x, stored, &call.tokens);
  call.bias = operands.vector(bias, y.columns, "bias");
  if (call.x.data == nullptr || !operands.readable) Py_RETURN_FALSE;
  const View held = Operands::described(weight, "weight");
  if (held.dimensions == 2) {
    Operands::expect(held.is_matrix(y.columns, x.columns) && held.dense && held.dtype == static_cast<int32_t>(stored),
                     "weight");
    call.weight = held.data;
    call.form = cpu::Form::stored;
  } else {
    call.weight = panels_of(weight, y.columns, x.columns, stored, isa);
    call.form = cpu::Form::packed;
  }
  call.y = written(y, call.tokens, "y");
  run_in(cpu::frozen_forward_workspace(call), "frozen_forward",
         [&](void* workspace, int64_t bytes) { return cpu::frozen_forward(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// frozen_backward(isa, threads, stored dtype, dy, panels, dx) -> whether dy could be read, so that dx was written.
PyObject* frozen_backward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 6, "frozen_backward");
  const Isa isa = static_cast<Isa>(arguments.integer());
  const auto threads = static_cast<int32_t>(arguments.integer());
  const auto stored = static_cast<Dtype>(arguments.integer());
  const View dy = Operands::described(arguments.object(), "dy");
  PyObject* const panels = arguments.object();
  const View dx = Operands::described(arguments.object(), "dx");
  cpu::FrozenBackward call{0, dx.columns, dy.columns, {}, nullptr, {}, stored, isa, threads};
  call.dy = rows_of(dy, stored, &call.tokens);
  if (call.dy.data == nullptr) Py_RETURN_FALSE;
  call.panels = panels_of(panels, dy.columns, dx.columns, stored, isa);
  call.dx = written(dx, call.tokens, "dx");
  run_in(cpu::frozen_backward_workspace(call), "frozen_backward",
         [&](void* workspace, int64_t bytes) { return cpu::frozen_backward(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// rms_norm(isa, threads, x, gain, offset, eps, y) -> whether x and the gain could be read, so that y was written.
PyObject* rms_norm(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 7, "rms_norm");
  const Isa isa = static_cast<Isa>(arguments.integer());
  const auto threads = static_cast<int32_t>(arguments.integer());
  const View x = Operands::described(arguments.object(), "x");
  Operands operands;
  cpu::RmsNorm call{0,  x.columns, {},     operands.vector(arguments.object(), x.columns, "gain"), 0.0f, 0.0f,
                    {}, isa,       threads};
  call.offset = arguments.number();
  call.eps = arguments.number();
  call.x = rows_of(x, &call.rows);
  if (call.x.data == nullptr || !operands.readable) Py_RETURN_FALSE;
  const View y = Operands::described(arguments.object(), "y");
  Operands::expect(y.columns == x.columns, "y");
  call.y = written(y, call.rows, "y");
  run("rms_norm", [&] { return cpu::rms_norm(call); });
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
