// A link's forward and backward pass on CPU tensors.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_library.h"
#include "cpu_run.h"
#include "link_arguments.h"
#include "operands.h"

namespace recmas::python {

namespace {

using Forms = PyObject* const[3];

LinkShape shape_of(const LinkArguments& a) {
  const View x = Operands::described(a.x, "x");
  Operands::expect(x.dimensions == 2, "x");
  return {x.rows, x.columns, Operands::described(a.w1, "w1").rows, Operands::described(a.w2, "w2").rows};
}

cpu::LinkWeights weights_of(const LinkArguments& a, Operands& operands, const LinkShape& s, Dtype compute,
                            const Forms& forms) {
  return {operands.weight(a.w1, forms[0], compute, s.hidden_features, s.in_features, "w1"),
          operands.weight(a.w2, forms[1], compute, s.out_features, s.hidden_features, "w2"),
          operands.weight(a.w3, forms[2], compute, s.out_features, s.in_features, "w3"),
          operands.vector(a.b1, s.hidden_features, "b1"),
          operands.vector(a.b2, s.out_features, "b2"),
          operands.vector(a.b3, s.out_features, "b3"),
          operands.vector(a.norm_in_weight, s.in_features, "norm_in weight"),
          operands.vector(a.norm_in_bias, s.in_features, "norm_in bias"),
          operands.vector(a.norm_out_weight, s.out_features, "norm_out weight"),
          operands.vector(a.norm_out_bias, s.out_features, "norm_out bias")};
}

cpu::LinkConfig config_of(const LinkSettings& settings, const LinkShape& shape, int64_t isa, int64_t threads) {
  return {shape,
          settings.residual,
          settings.gelu,
          settings.eps,
          settings.compute,
          static_cast<Isa>(isa),
          static_cast<int32_t>(threads),
          torch_sgemm()};
}

}  // namespace

// link_forward(isa, threads, LinkArguments, forms of w1, w2, w3, y, pre, z, stats) -> whether every tensor could be
// read, so that y was written. pre, z and stats may be None.
PyObject* link_forward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 10, "link_forward");
  const int64_t isa = arguments.integer(), threads = arguments.integer();
  const LinkArguments link = read_link_arguments(arguments.object());
  const LinkSettings settings = read_settings(link, reader());
  PyObject* const forms[] = {arguments.object(), arguments.object(), arguments.object()};
  const LinkShape shape = shape_of(link);
  Operands operands;
  cpu::LinkForward call{};
  call.config = config_of(settings, shape, isa, threads);
  call.weights = weights_of(link, operands, shape, settings.compute, forms);
  call.x = operands.matrix(link.x, shape.tokens, shape.in_features, "x");
  if (!operands.readable) Py_RETURN_FALSE;
  call.y = Operands::output(arguments.object(), shape.tokens * shape.out_features, "y");
  call.pre = Operands::output(arguments.object(), shape.tokens * shape.hidden_features, "pre");
  call.z = Operands::output(arguments.object(), shape.tokens * shape.out_features, "z");
  PyObject* const stats = arguments.object();
  if (stats != Py_None) Operands::expect_float(Operands::described(stats, "stats"), "stats");
  call.stats = static_cast<float*>(Operands::output(stats, 4 * shape.tokens, "stats").data);
  run_in(cpu::link_forward_workspace(call), "link_forward",
         [&](void* workspace, int64_t bytes) { return cpu::link_forward(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// link_backward(isa, threads, LinkArguments, dy, pre, z or None, stats, eleven gradients or None: of x, then of the
// parameters) -> whether every tensor could be read, so that the gradients were written.
PyObject* link_backward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 18, "link_backward");
  const int64_t isa = arguments.integer(), threads = arguments.integer();
  const LinkArguments link = read_link_arguments(arguments.object());
  const LinkSettings settings = read_settings(link, reader());
  PyObject *const dy = arguments.object(), *const pre = arguments.object(), *const z = arguments.object(),
                  *const stats = arguments.object();
  PyObject* const forms[] = {Py_False, Py_False, Py_False};
  const LinkShape s = shape_of(link);
  Operands operands;
  cpu::LinkBackward call{};
  call.config = config_of(settings, s, isa, threads);
  call.weights = weights_of(link, operands, s, settings.compute, forms);
  call.dy = operands.matrix(dy, s.tokens, s.out_features, "dy");
  call.x = operands.matrix(link.x, s.tokens, s.in_features, "x");
  call.pre = operands.matrix(pre, s.tokens, s.hidden_features, "pre");
  if (z != Py_None) call.z = operands.matrix(z, s.tokens, s.out_features, "z");
  Operands::expect_float(Operands::described(stats, "stats"), "stats");
  const MatrixView rows = operands.matrix(stats, 4, s.tokens, "stats");
  operands.require(rows.stride == s.tokens || s.tokens == 0);
  call.stats = static_cast<const float*>(rows.data);
  if (!operands.readable) Py_RETURN_FALSE;
  const auto gradient = [&](int64_t elements, const char* name) {
    return Operands::output(arguments.object(), elements, name);
  };
  call.dx = gradient(s.tokens * s.in_features, "dx");
  call.dw1 = gradient(s.hidden_features * s.in_features, "dw1");
  call.db1 = gradient(s.hidden_features, "db1");
  call.dw2 = gradient(s.out_features * s.hidden_features, "dw2");
  call.db2 = gradient(s.out_features, "db2");
  call.dw3 = gradient(s.out_features * s.in_features, "dw3");
  call.db3 = gradient(s.out_features, "db3");
  call.dnorm_in_weight = gradient(s.in_features, "dnorm_in weight");
  call.dnorm_in_bias = gradient(s.in_features, "dnorm_in bias");
  call.dnorm_out_weight = gradient(s.out_features, "dnorm_out weight");
  call.dnorm_out_bias = gradient(s.out_features, "dnorm_out bias");
  run_in(cpu::link_backward_workspace(call), "link_backward",
         [&](void* workspace, int64_t bytes) { return cpu::link_backward(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
