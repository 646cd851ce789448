// Tensors as the CPU kernels read and write them. Whatever a kernel would read or write past its end, or take for what
// it is not, is refused here: no address reaches a kernel by another way.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../link.h"
#include "tensors.h"

namespace recmas::python {

// Reads tensors for a kernel. One that the kernel cannot read as it is (another element type, a stride) only clears
// `readable`: the caller converts it and calls again. A wrong shape is an error.
struct Operands {
  bool readable = true;

  static View described(PyObject* object, const char* name) {
    const View view = reader().read(object);
    if (!view.on_cpu()) throw py::value_error(std::string(name) + " is not in the CPU's memory");
    return view;
  }

  void require(bool kernel_can_read) { readable = readable && kernel_can_read; }

  static void expect(bool fits, const char* name) {
    if (!fits) throw py::value_error(std::string(name) + " has another shape than the call");
  }

  MatrixView matrix(PyObject* object, int64_t rows, int64_t columns, const char* name) {
    const View view = described(object, name);
    expect(view.is_matrix(rows, columns), name);
    require(view.dtype != View::kOther && view.has_dense_rows());
    return {view.data, view.row_stride, view.kernel_dtype()};
  }

  // `form`: a bool (summed in panel order or not), or the packed panels as a tensor.
  cpu::Weight weight(PyObject* object, PyObject* form, Dtype compute, int64_t rows, int64_t columns, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object, name);
    expect(view.is_matrix(rows, columns), name);
    if (!PyBool_Check(form)) {
      const bool fp32 = view.dtype == static_cast<int32_t>(Dtype::f32) && view.is_contiguous();
      return {described(form, name).data, Dtype::f32, cpu::Form::packed, fp32 ? view.data : nullptr};
    }
    require((view.dtype == static_cast<int32_t>(Dtype::f32) || view.dtype == static_cast<int32_t>(compute)) &&
            view.is_contiguous());
    return {view.data, view.kernel_dtype(), form == Py_True ? cpu::Form::stored_panel_order : cpu::Form::stored};
  }

  VectorView vector(PyObject* object, int64_t length, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object, name);
    expect(view.is_vector(length), name);
    require(view.dtype != View::kOther && view.is_contiguous());
    return {view.data, view.kernel_dtype()};
  }

  // What a kernel writes; allocated for it, so there is nothing to convert.
  static Output output(PyObject* object, int64_t elements, const char* name) {
    if (object == Py_None) return {};
    const View view = described(object, name);
    expect(view.dimensions <= 2 && view.rows * view.columns == elements && view.is_contiguous() &&
               view.dtype != View::kOther,
           name);
    return {view.data, view.kernel_dtype()};
  }

  // A contiguous vector of one element type, such as row numbers.
  static const int64_t* int64_vector(PyObject* object, int64_t length, const char* name) {
    const View view = described(object, name);
    expect(view.is_vector(length) && view.is_contiguous(), name);
    if (!view.is_int64) throw py::type_error(std::string(name) + " is not int64");
    return static_cast<const int64_t*>(view.data);
  }
  static const float* float_vector(PyObject* object, int64_t length, const char* name) {
    const View view = described(object, name);
    expect(view.is_vector(length) && view.is_contiguous(), name);
    expect_float(view, name);
    return static_cast<const float*>(view.data);
  }
  static void expect_float(const View& view, const char* name) {
    if (view.dtype != static_cast<int32_t>(Dtype::f32)) throw py::type_error(std::string(name) + " is not float32");
  }
};

}  // namespace recmas::python
