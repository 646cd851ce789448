// recmas_kernels._cpu: link.h's CPU entries for Python. Tensors come as they are and are read by tensors.h; dtypes,
// residual and gelu kinds come as link.h's numbers. The GIL is released while a kernel runs; a status that is not ok
// becomes an exception. The caller (recmas_kernels/backends/cpu.py) allocates what is written.
//
// The entries that every call of a link goes through take their arguments as an array (METH_FASTCALL): pybind11's own
// conversion of two dozen of them costs more than a small kernel.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../link.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using namespace recmas;
using python::Reader;
using python::View;

Reader& reader() {
  static Reader* const kept = new Reader;  // never destroyed: the interpreter may end before static objects do
  return *kept;
}

void check(Status status, const char* entry) {
  switch (status) {
    case Status::ok:
      return;
    case Status::isa_unavailable:
      throw std::runtime_error(std::string(entry) + ": this processor or build lacks the instruction set asked for");
    case Status::workspace_too_small:
      throw std::runtime_error(std::string(entry) + ": the workspace is too small");
    case Status::row_out_of_range:
      throw py::index_error(std::string(entry) + ": a slot row or token id is out of range");
    default:
      throw std::runtime_error(std::string(entry) + ": an argument is not served (status " +
                               std::to_string(static_cast<int>(status)) + ")");
  }
}

template <class Run>
void run(const char* entry, const Run& body) {
  Status status;
  {
    py::gil_scoped_release released;
    status = body();
  }
  check(status, entry);
}

// `body(workspace, bytes)` with scratch memory: the stack's if it is little, else a tensor's.
template <class Run>
void run_in(int64_t bytes, const char* entry, const Run& body) {
  constexpr int64_t kOnStack = 4096;
  if (bytes <= kOnStack) {
    alignas(64) char scratch[kOnStack];
    run(entry, [&] { return body(static_cast<void*>(scratch), kOnStack); });
  } else {
    const py::object tensor = reader().allocate(bytes);
    void* const scratch = reader().read(tensor.ptr()).data;
    run(entry, [&] { return body(scratch, bytes); });
  }
}

// The arguments of one call, read in order.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* entry) : next_(values) {
    if (count != expected) {
      throw py::type_error(std::string(entry) + ": expected " + std::to_string(expected) + " arguments, got " +
                           std::to_string(count));
    }
  }

  PyObject* object() { return *next_++; }

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(object());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  float real() {
    const double value = PyFloat_AsDouble(object());
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }

 private:
  PyObject* const* next_;
};

// Reads tensors for a kernel. One that the kernel cannot read as it lies (another element type, a stride) only clears
// `readable`: the caller converts it and calls again. A wrong shape is an error.
struct Operands {
  bool readable = true;

  static View described(PyObject* object) { return reader().read(object); }

  void require(bool kernel_can_read) { readable = readable && kernel_can_read; }

  static void expect(bool fits, const char* name) {
    if (!fits) throw py::value_error(std::string(name) + " has another shape than the call");
  }

  MatrixView matrix(PyObject* object, int64_t rows, int64_t columns, const char* name) {
    const View view = described(object);
    expect(view.is_matrix(rows, columns), name);
    require(view.dtype != View::kOther && view.has_dense_rows());
    return {view.data, view.row_stride, view.kernel_dtype()};
  }

  // `form`: a bool (summed in panel order or not), or the packed panels as a tensor.
  cpu::Weight weight(PyObject* object, PyObject* form, Dtype compute, int64_t rows, int64_t columns, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object);
    expect(view.is_matrix(rows, columns), name);
    if (!PyBool_Check(form)) return {described(form).data, Dtype::f32, cpu::Form::packed};
    require((view.dtype == static_cast<int32_t>(Dtype::f32) || view.dtype == static_cast<int32_t>(compute)) &&
            view.is_contiguous());
    return {view.data, view.kernel_dtype(), form == Py_True ? cpu::Form::stored_panel_order : cpu::Form::stored};
  }

  VectorView vector(PyObject* object, int64_t length, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object);
    expect(view.is_vector(length), name);
    require(view.dtype != View::kOther && view.is_contiguous());
    return {view.data, view.kernel_dtype()};
  }

  // What a kernel writes; allocated for it, so there is nothing to convert.
  static Output output(PyObject* object, int64_t elements, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object);
    expect(view.dimensions <= 2 && view.rows * view.columns == elements && view.is_contiguous() &&
               view.dtype != View::kOther,
           name);
    return {view.data, view.kernel_dtype()};
  }
};

struct LinkSettings {
  Isa isa;
  int32_t threads;
  Dtype compute;
  Residual residual;
  Gelu gelu;
  float eps;

  explicit LinkSettings(Arguments& arguments)
      : isa(static_cast<Isa>(arguments.integer())),
        threads(static_cast<int32_t>(arguments.integer())),
        compute(static_cast<Dtype>(arguments.integer())),
        residual(static_cast<Residual>(arguments.integer())),
        gelu(static_cast<Gelu>(arguments.integer())),
        eps(arguments.real()) {}

  cpu::LinkConfig config(const LinkShape& shape) const { return {shape, residual, gelu, eps, compute, isa, threads}; }
};

struct LinkTensors {
  PyObject *w1, *b1, *w2, *b2, *w3, *b3, *norm_in_weight, *norm_in_bias, *norm_out_weight, *norm_out_bias;

  explicit LinkTensors(Arguments& arguments)
      : w1(arguments.object()),
        b1(arguments.object()),
        w2(arguments.object()),
        b2(arguments.object()),
        w3(arguments.object()),
        b3(arguments.object()),
        norm_in_weight(arguments.object()),
        norm_in_bias(arguments.object()),
        norm_out_weight(arguments.object()),
        norm_out_bias(arguments.object()) {}

  LinkShape shape(PyObject* x) const {
    const View rows = reader().read(x);
    Operands::expect(rows.dimensions == 2, "x");
    return {rows.rows, rows.columns, reader().read(w1).rows, reader().read(w2).rows};
  }

  cpu::LinkWeights read(Operands& operands, const LinkShape& s, Dtype compute, PyObject* const forms[3]) const {
    return {operands.weight(w1, forms[0], compute, s.hidden_features, s.in_features, "w1"),
            operands.weight(w2, forms[1], compute, s.out_features, s.hidden_features, "w2"),
            operands.weight(w3, forms[2], compute, s.out_features, s.in_features, "w3"),
            operands.vector(b1, s.hidden_features, "b1"),
            operands.vector(b2, s.out_features, "b2"),
            operands.vector(b3, s.out_features, "b3"),
            operands.vector(norm_in_weight, s.in_features, "norm_in weight"),
            operands.vector(norm_in_bias, s.in_features, "norm_in bias"),
            operands.vector(norm_out_weight, s.out_features, "norm_out weight"),
            operands.vector(norm_out_bias, s.out_features, "norm_out bias")};
  }
};

// link_forward(isa, threads, compute, residual, gelu, eps, x, ten parameters, forms of w1, w2, w3, y, pre, z, stats)
// -> whether every tensor could be read, so that y was written. pre, z and stats may be None.
PyObject* link_forward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 24, "link_forward");
  const LinkSettings settings(arguments);
  PyObject* const x = arguments.object();
  const LinkTensors tensors(arguments);
  PyObject* const forms[] = {arguments.object(), arguments.object(), arguments.object()};
  const LinkShape shape = tensors.shape(x);
  Operands operands;
  cpu::LinkForward call{};
  call.config = settings.config(shape);
  call.weights = tensors.read(operands, shape, settings.compute, forms);
  call.x = operands.matrix(x, shape.tokens, shape.in_features, "x");
  if (!operands.readable) Py_RETURN_FALSE;
  call.y = Operands::output(arguments.object(), shape.tokens * shape.out_features, "y");
  call.pre = Operands::output(arguments.object(), shape.tokens * shape.hidden_features, "pre");
  call.z = Operands::output(arguments.object(), shape.tokens * shape.out_features, "z");
  call.stats = static_cast<float*>(Operands::output(arguments.object(), 4 * shape.tokens, "stats").data);
  run_in(cpu::link_forward_workspace(call), "link_forward",
         [&](void* workspace, int64_t bytes) { return cpu::link_forward(call, workspace, bytes); });
  Py_RETURN_TRUE;
}

// link_backward(isa, threads, compute, residual, gelu, eps, dy, x, pre, z or None, stats, ten parameters, eleven
// gradients or None: of x, then of the parameters) -> whether every tensor could be read and the gradients are written.
PyObject* link_backward(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 32, "link_backward");
  const LinkSettings settings(arguments);
  PyObject *const dy = arguments.object(), *const x = arguments.object(), *const pre = arguments.object(),
                  *const z = arguments.object(), *const stats = arguments.object();
  const LinkTensors tensors(arguments);
  PyObject* const forms[] = {Py_False, Py_False, Py_False};
  const LinkShape s = tensors.shape(x);
  Operands operands;
  cpu::LinkBackward call{};
  call.config = settings.config(s);
  call.weights = tensors.read(operands, s, settings.compute, forms);
  call.dy = operands.matrix(dy, s.tokens, s.out_features, "dy");
  call.x = operands.matrix(x, s.tokens, s.in_features, "x");
  call.pre = operands.matrix(pre, s.tokens, s.hidden_features, "pre");
  if (z != Py_None) call.z = operands.matrix(z, s.tokens, s.out_features, "z");
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

// link_is_plain(residual, mixed, x, ten parameters) -> whether these are plain tensors on one device that fit each
// other and need no conversion. `mixed`: parameters may have another floating-point type than x. False says nothing
// but that the caller has to look closely.
//
// A conjugated tensor is complex, hence no link's; the caller asks whether x is a negated view. Parameters are not
// asked.
bool is_plain(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 13, "link_is_plain");
  PyObject* const residual = arguments.object();
  const bool mixed = arguments.object() == Py_True;
  PyObject* const x = arguments.object();
  const LinkTensors t(arguments);
  const auto is = [&](const char* kind) { return PyUnicode_CompareWithASCIIString(residual, kind) == 0; };
  const bool identity = is("identity"), linear = is("linear");
  if (!(identity || linear || is("none")) || linear != (t.w3 != Py_None) || (!linear && t.b3 != Py_None)) {
    return false;
  }
  if (!reader().is_plain(x) || !reader().is_plain(t.w1) || !reader().is_plain(t.w2)) return false;
  const View rows = reader().read(x), first = reader().read(t.w1), second = reader().read(t.w2);
  const int64_t in = rows.columns, hidden = first.rows, out = second.rows;
  if (rows.dimensions < 1 || rows.dtype == View::kOther || rows.column_stride != 1 || (identity && in != out)) {
    return false;
  }
  const auto joins = [&](const View& view) {
    return view.device_type == rows.device_type && view.device_index == rows.device_index &&
           (mixed ? view.dtype != View::kOther : view.dtype == rows.dtype) && view.column_stride == 1 &&
           view.is_contiguous();
  };
  const auto is_vector = [&](PyObject* object, int64_t length) {
    if (object == Py_None) return true;
    if (!reader().is_plain(object)) return false;
    const View view = reader().read(object);
    return view.is_vector(length) && joins(view);
  };
  const auto is_norm = [&](PyObject* weight, PyObject* bias, int64_t length) {
    return (weight != Py_None || bias == Py_None) && is_vector(weight, length) && is_vector(bias, length);
  };
  const auto is_third = [&] {
    if (!linear) return true;
    if (!reader().is_plain(t.w3)) return false;
    const View view = reader().read(t.w3);
    return view.is_matrix(out, in) && joins(view);
  };
  const bool plain = first.is_matrix(hidden, in) && joins(first) && second.is_matrix(out, hidden) && joins(second) &&
                     is_third() && is_vector(t.b1, hidden) && is_vector(t.b2, out) && is_vector(t.b3, out) &&
                     is_norm(t.norm_in_weight, t.norm_in_bias, in) && is_norm(t.norm_out_weight, t.norm_out_bias, out);
  return plain;
}

PyObject* link_is_plain(PyObject* const* values, Py_ssize_t count) {
  try {
    return PyBool_FromLong(is_plain(values, count));
  } catch (py::error_already_set&) {  // such as a sparse or a meta tensor, which has no address
    Py_RETURN_FALSE;
  }
}

// sample_words(weight, samples int64 [64]); words_match(weight, samples) -> bool. Both tensors are contiguous.
int64_t bytes_of(py::handle tensor) { return tensor.attr("nbytes").cast<int64_t>(); }

void sample_words(py::handle weight, py::handle samples) {
  cpu::sample_words(reader().read(weight.ptr()).data, bytes_of(weight),
                    static_cast<uint64_t*>(reader().read(samples.ptr()).data));
}

PyObject* words_match(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 3, "words_match");
  const void* const data = reader().read(arguments.object()).data;
  const int64_t bytes = arguments.integer();
  return PyBool_FromLong(
      cpu::words_match(data, bytes, static_cast<const uint64_t*>(reader().read(arguments.object()).data)));
}

void pack_weight(int isa, int threads, int compute, py::handle weight, py::handle packed) {
  Operands operands;
  const View view = reader().read(weight.ptr());
  operands.require(view.dimensions == 2 && view.dtype != View::kOther && view.is_contiguous());
  if (!operands.readable) throw py::value_error("pack_weight: the weight is not a contiguous matrix of a served dtype");
  void* const target = reader().read(packed.ptr()).data;
  run("pack_weight", [&] {
    return cpu::pack_weight({view.data, view.kernel_dtype()}, view.rows, view.columns, target,
                            static_cast<Dtype>(compute), static_cast<Isa>(isa), threads);
  });
}

// Rows of any element type, so their bytes are given; every tensor has dense rows.
void handoff_scatter(py::handle rows, py::handle slot_rows, py::handle table, int64_t element_bytes) {
  const View from = reader().read(rows.ptr()), slots = reader().read(slot_rows.ptr()), to = reader().read(table.ptr());
  run("handoff_scatter", [&] {
    return cpu::handoff_scatter(from.data, from.row_stride * element_bytes, static_cast<const int64_t*>(slots.data),
                                from.rows, from.columns * element_bytes, to.data, to.row_stride * element_bytes,
                                to.rows);
  });
}

void handoff_take(py::handle table, py::handle slot_rows, py::handle rows, int64_t element_bytes) {
  const View from = reader().read(table.ptr()), slots = reader().read(slot_rows.ptr()), to = reader().read(rows.ptr());
  run("handoff_take", [&] {
    return cpu::handoff_take(from.data, from.row_stride * element_bytes, from.rows,
                             static_cast<const int64_t*>(slots.data), to.rows, to.columns * element_bytes, to.data);
  });
}

MatrixView served_matrix(py::handle tensor, const char* name) {
  Operands operands;
  const View view = reader().read(tensor.ptr());
  const MatrixView matrix = operands.matrix(tensor.ptr(), view.rows, view.columns, name);
  if (!operands.readable)
    throw py::value_error(std::string(name) + " is of no served dtype, or its rows are not dense");
  return matrix;
}

// token_ids int64 [T] or None, mask float32 [T] or None, loss float32 [], grad [T, features] of pred's dtype.
void alignment(int isa, int threads, py::handle pred, py::handle target, py::handle token_ids, py::handle mask,
               float cosine_weight, float mse_weight, float embed_scale, py::handle loss, py::handle grad) {
  const View rows = reader().read(pred.ptr());
  const auto address = [](py::handle tensor) { return tensor.is_none() ? nullptr : reader().read(tensor.ptr()).data; };
  const cpu::Alignment call{rows.rows,
                            rows.columns,
                            reader().read(target.ptr()).rows,
                            served_matrix(pred, "pred"),
                            served_matrix(target, "target"),
                            static_cast<const int64_t*>(address(token_ids)),
                            static_cast<const float*>(address(mask)),
                            cosine_weight,
                            mse_weight,
                            embed_scale,
                            static_cast<float*>(address(loss)),
                            Operands::output(grad.ptr(), rows.rows * rows.columns, "grad"),
                            static_cast<Isa>(isa),
                            threads};
  run_in(cpu::alignment_workspace(call), "alignment",
         [&](void* workspace, int64_t bytes) { return cpu::alignment(call, workspace, bytes); });
}

using Entry = PyObject* (*)(PyObject* const*, Py_ssize_t);

template <Entry entry>
PyObject* called(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    return entry(values, count);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <Entry entry>
constexpr PyMethodDef fast(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called<entry>)), METH_FASTCALL, nullptr};
}

PyMethodDef fast_entries[] = {
    fast<&link_forward>("link_forward"), fast<&link_backward>("link_backward"), fast<&link_is_plain>("link_is_plain"),
    fast<&words_match>("words_match"),   {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels over torch tensors; recmas_kernels.backends.cpu is the only caller.";
  if (PyModule_AddFunctions(module.ptr(), fast_entries) != 0) throw py::error_already_set();
  module.attr("sources") = RECMAS_SOURCES;
  module.def("connect", [](const py::module_& torch, const py::object& table) { reader().connect(torch, table); });
  module.def("best_isa", [] { return static_cast<int>(cpu::best_isa()); });
  module.def("packed_bytes", [](int isa, int compute, int64_t rows, int64_t columns) {
    return cpu::packed_bytes(rows, columns, static_cast<Dtype>(compute), static_cast<Isa>(isa));
  });
  module.def("pack_weight", &pack_weight);
  module.def("sample_words", &sample_words);
  module.def("handoff_scatter", &handoff_scatter);
  module.def("handoff_take", &handoff_take);
  module.def("alignment", &alignment);
}
