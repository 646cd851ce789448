// Rows and packed weights as the kernels of frozen layers read them.
#pragma once

#include "../link.h"
#include "operands.h"

namespace recmas::python {

// Rows of any leading dimensions. Null if a kernel cannot read them as they lie.
inline MatrixView rows_of(const View& view, int64_t* count) {
  if (view.dtype == View::kOther || view.columns == 0) return {};
  *count = view.elements / view.columns;
  if (view.dense) return {view.data, view.columns, view.kernel_dtype()};
  if (view.dimensions == 2 && view.has_dense_rows()) return {view.data, view.row_stride, view.kernel_dtype()};
  return {};
}

// Of the stored dtype or fp32.
inline MatrixView rows_of(const View& view, Dtype stored, int64_t* count) {
  const bool readable = view.dtype == static_cast<int32_t>(Dtype::f32) || view.dtype == static_cast<int32_t>(stored);
  return readable ? rows_of(view, count) : MatrixView{};
}

inline const void* panels_of(PyObject* object, int64_t rows, int64_t columns, Dtype stored, Isa isa) {
  const View view = Operands::described(object, "panels");
  Operands::expect(
      view.is_vector(cpu::packed_bytes(rows, columns, stored, isa)) && view.element_bytes == 1 && view.dense, "panels");
  return view.data;
}

// A dense tensor that `rows` rows are written into.
inline Output written(const View& view, int64_t rows, const char* name) {
  Operands::expect(view.dense && view.elements == rows * view.columns && view.dtype != View::kOther, name);
  return {view.data, view.kernel_dtype()};
}

}  // namespace recmas::python
