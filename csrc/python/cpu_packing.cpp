// Packed weights: their size, the packing, and the way back.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "operands.h"
#include "tensors.h"

namespace recmas::python {

int64_t packed_bytes(int isa, int compute, int64_t rows, int64_t columns) {
  return cpu::packed_bytes(rows, columns, static_cast<Dtype>(compute), static_cast<Isa>(isa));
}

void pack_weight(int isa, int threads, int compute, py::handle weight, py::handle packed) {
  const View view = reader().read(weight.ptr());
  if (view.dimensions != 2 || view.dtype == View::kOther || !view.is_contiguous()) {
    throw py::value_error("pack_weight: the weight is not a contiguous matrix of a served dtype");
  }
  void* const target = reader().read(packed.ptr()).data;
  run("pack_weight", [&] {
    return cpu::pack_weight({view.data, view.kernel_dtype()}, view.rows, view.columns, target,
                            static_cast<Dtype>(compute), static_cast<Isa>(isa), threads);
  });
}

void unpack_weight(int isa, int threads, py::handle packed, py::handle weight) {
  const View view = Operands::described(weight.ptr(), "weight"), panels = Operands::described(packed.ptr(), "panels");
  if (view.dimensions != 2 || view.dtype == View::kOther || !view.is_contiguous()) {
    throw py::value_error("unpack_weight: the weight is not a contiguous matrix of a served dtype");
  }
  const Dtype dtype = view.kernel_dtype();
  Operands::expect(panels.element_bytes == 1 && panels.dense &&
                       panels.is_vector(cpu::packed_bytes(view.rows, view.columns, dtype, static_cast<Isa>(isa))),
                   "panels");
  run("unpack_weight", [&] {
    return cpu::unpack_weight(panels.data, view.rows, view.columns, view.data, dtype, static_cast<Isa>(isa), threads);
  });
}

}  // namespace recmas::python
