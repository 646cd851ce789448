// Packed weights: their size and the packing.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "cpu_entries.h"
#include "cpu_run.h"
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

}  // namespace recmas::python
