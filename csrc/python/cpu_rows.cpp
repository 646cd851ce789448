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

MatrixView served_matrix(py::handle tensor, int64_t rows, int64_t columns, const char* name) {
  Operands operands;
  const MatrixView matrix = operands.matrix(tensor.ptr(), rows, columns, name);
  if (!operands.readable)
    throw py::value_error(std::string(name) + " is of no served dtype, or its rows are not dense");
  return matrix;
}

// A matrix of any element type with dense rows.
View dense_matrix(py::handle tensor, const char* name) {
  const View view = Operands::described(tensor.ptr(), name);
  Operands::expect(view.dimensions == 2, name);
  if (view.rows > 0 && !view.has_dense_rows())
    throw py::value_error(std::string(name) + " have rows that are not dense");
  return view;
}

float* loss_at(py::handle loss) {
  const Output output = Operands::output(loss.ptr(), 1, "loss");
  if (output.dtype != Dtype::f32) throw py::type_error("loss is not float32");
  return static_cast<float*>(output.data);
}

// Whole rows move between `rows` [n, width] and `table` [any, width], so both have one width and one element size.
struct Handoff {
  View rows, table;
  const int64_t* slots;  // [n]

  Handoff(py::handle rows_tensor, py::handle slot_rows, py::handle table_tensor)
      : rows(dense_matrix(rows_tensor, "rows")),
        table(dense_matrix(table_tensor, "embeds")),
        slots(Operands::int64_vector(slot_rows.ptr(), rows.rows, "slot_rows")) {
    Operands::expect(rows.columns == table.columns && rows.element_bytes == table.element_bytes, "rows");
  }

  int64_t row_bytes() const { return rows.columns * rows.element_bytes; }
  int64_t table_stride() const { return table.row_stride * table.element_bytes; }
};

}  // namespace

void handoff_scatter(py::handle rows, py::handle slot_rows, py::handle table) {
  const Handoff call(rows, slot_rows, table);
  run("handoff_scatter", [&] {
    return cpu::handoff_scatter(call.rows.data, call.rows.row_stride * call.rows.element_bytes, call.slots,
                                call.rows.rows, call.row_bytes(), call.table.data, call.table_stride(),
                                call.table.rows);
  });
}

// rows: contiguous.
void handoff_take(py::handle table, py::handle slot_rows, py::handle rows) {
  const Handoff call(rows, slot_rows, table);
  Operands::expect(call.rows.is_contiguous(), "rows");
  run("handoff_take", [&] {
    return cpu::handoff_take(call.table.data, call.table_stride(), call.table.rows, call.slots, call.rows.rows,
                             call.row_bytes(), call.rows.data);
  });
}

// token_ids int64 [T] or None, mask float32 [T] or None, loss float32 [], grad [T, features] of pred's dtype.
void alignment(int isa, int threads, py::handle pred, py::handle target, py::handle token_ids, py::handle mask,
               float cosine_weight, float mse_weight, float embed_scale, py::handle loss, py::handle grad) {
  const View rows = Operands::described(pred.ptr(), "pred"), table = Operands::described(target.ptr(), "target");
  const Output gradient = Operands::output(grad.ptr(), rows.rows * rows.columns, "grad");
  if (gradient.dtype != rows.kernel_dtype()) throw py::type_error("grad has another dtype than pred");
  const cpu::Alignment call{
      rows.rows,
      rows.columns,
      table.rows,
      served_matrix(pred, rows.rows, rows.columns, "pred"),
      served_matrix(target, token_ids.is_none() ? rows.rows : table.rows, rows.columns, "target"),
      token_ids.is_none() ? nullptr : Operands::int64_vector(token_ids.ptr(), rows.rows, "token_ids"),
      mask.is_none() ? nullptr : Operands::float_vector(mask.ptr(), rows.rows, "mask"),
      cosine_weight,
      mse_weight,
      embed_scale,
      loss_at(loss),
      gradient,
      static_cast<Isa>(isa),
      threads};
  run_in(cpu::alignment_workspace(call), "alignment",
         [&](void* workspace, int64_t bytes) { return cpu::alignment(call, workspace, bytes); });
}

}  // namespace recmas::python
