// How the bindings read a tensor: address, device, element type, sizes and strides of its last two dimensions.
//
// Through the table of C functions that DLPack specifies and torch.Tensor carries, whose layout is a stable ABI: about
// 20 ns per tensor, and still not one torch header. A torch without the table is read through Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"

namespace recmas::python {

namespace py = pybind11;

struct View {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  int32_t dtype;  // link.h's number; kOther for element types that the kernels do not read
  int64_t rows, columns, row_stride, column_stride;  // of the last two dimensions; a vector is one row
  int64_t elements;
  bool dense;  // all dimensions follow each other in memory
  int32_t element_bytes;
  bool is_int64;
  int64_t sizes[4], strides[4];  // of tensors of up to four dimensions

  static constexpr int32_t kOther = -1, kCpu = 1;  // kCpu as DLPack numbers devices

  bool on_cpu() const { return device_type == kCpu; }
  Dtype kernel_dtype() const { return static_cast<Dtype>(dtype); }
  bool is_matrix(int64_t matrix_rows, int64_t matrix_columns) const {
    return dimensions == 2 && rows == matrix_rows && columns == matrix_columns;
  }
  bool is_vector(int64_t length) const { return dimensions == 1 && columns == length; }
  bool has_dense_rows() const { return columns <= 1 || column_stride == 1; }
  bool is_contiguous() const { return has_dense_rows() && (rows <= 1 || row_stride == columns); }
};

class Reader {
 public:
  // `torch` is the module; `table` the capsule, or None to read attributes.
  void connect(const py::module_& torch, const py::object& table);

  // A torch.Tensor or Parameter itself: no subclass, which may mean something else by its data.
  bool is_plain(PyObject* object) const {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  // Throws TypeError for what is no tensor, and what torch throws for a tensor without memory.
  View read(PyObject* object) const;

  // Where a tensor keeps its sizes and strides side by side, each with room for five dimensions, as torch's do for that
  // many; null if it does not, or if nobody can tell.
  static constexpr int kShape = 10;
  const int64_t* shape_inside(PyObject* object) const;

  // link.h's number of a torch.dtype, or View::kOther.
  int32_t dtype_of(PyObject* dtype) const;

  // `bytes` of uninitialised memory as a torch tensor, aligned to 64.
  py::object allocate(int64_t bytes) const;

 private:
  View read_attributes(PyObject* object) const;

  int (*describe_)(void* object, void* description) = nullptr;
  py::object torch_, tensor_, parameter_, byte_, int64_, cpu_;
  py::object kernel_dtypes_[3];  // by link.h's number
};

// The reader of the module that this file is compiled into.
Reader& reader();

}  // namespace recmas::python
