// The handoff and the alignment loss on CPU tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../link.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "operands.h"

namespace recmas::python {

namespace {

MatrixView served_matrix(py::handle tensor, const char* name) {
  Operands operands;
  const View view = reader().read(tensor.ptr());
  const MatrixView matrix = operands.matrix(tensor.ptr(), view.rows, view.columns, name);
  if (!operands.readable)
    throw py::value_error(std::string(name) + " is of no served dtype, or its rows are not dense");
  return matrix;
}

}  // namespace

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

}  // namespace recmas::python
