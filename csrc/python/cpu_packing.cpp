// Packed weights: their size, the packing, and the sampled words by which a change of the weight shows.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_run.h"
#include "tensors.h"

namespace recmas::python {

int64_t packed_bytes(int isa, int compute, int64_t rows, int64_t columns) {
  return cpu::packed_bytes(rows, columns, static_cast<Dtype>(compute), static_cast<Isa>(isa));
}

// sample_words(weight, samples int64 [64]). Both tensors are contiguous.
void sample_words(py::handle weight, py::handle samples) {
  cpu::sample_words(reader().read(weight.ptr()).data, weight.attr("nbytes").cast<int64_t>(),
                    static_cast<uint64_t*>(reader().read(samples.ptr()).data));
}

// words_match(weight, its bytes, samples) -> bool
PyObject* words_match(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 3, "words_match");
  const void* const data = reader().read(arguments.object()).data;
  const int64_t bytes = arguments.integer();
  return PyBool_FromLong(
      cpu::words_match(data, bytes, static_cast<const uint64_t*>(reader().read(arguments.object()).data)));
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
