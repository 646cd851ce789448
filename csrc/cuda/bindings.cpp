// The only CUDA file that knows Python: integers in, GIL released while launching, error code → exception.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "link.h"

namespace py = pybind11;

namespace {

void raise_if_failed(int32_t code, const char* op, int device) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  throw std::runtime_error(std::string(op) + " on cuda:" + std::to_string(device) + ": CUDA error " +
                           std::to_string(code) + " (" + cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

void handoff_scatter(uintptr_t rows, int64_t rows_stride, uintptr_t slot_rows, int64_t count, int64_t row_bytes,
                     uintptr_t table, int64_t table_stride, int64_t table_rows, int device, uintptr_t stream) {
  int32_t code = 0;
  {
    const py::gil_scoped_release unlocked;
    code = recmas::cuda::handoff_scatter(reinterpret_cast<const void*>(rows), rows_stride,
                                         reinterpret_cast<const int64_t*>(slot_rows), count, row_bytes,
                                         reinterpret_cast<void*>(table), table_stride, table_rows, stream);
  }
  raise_if_failed(code, "handoff_scatter", device);
}

void handoff_take(uintptr_t table, int64_t table_stride, int64_t table_rows, uintptr_t slot_rows, int64_t count,
                  int64_t row_bytes, uintptr_t rows, int device, uintptr_t stream) {
  int32_t code = 0;
  {
    const py::gil_scoped_release unlocked;
    code = recmas::cuda::handoff_take(reinterpret_cast<void*>(table), table_stride, table_rows,
                                      reinterpret_cast<const int64_t*>(slot_rows), count, row_bytes,
                                      reinterpret_cast<void*>(rows), stream);
  }
  raise_if_failed(code, "handoff_take", device);
}

int driver_version() {
  int version = 0;
  const cudaError_t code = cudaDriverGetVersion(&version);
  if (code != cudaSuccess) throw std::runtime_error(std::string("driver_version: ") + cudaGetErrorString(code));
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels over raw pointers; recmas_kernels.backends.cuda is the only caller.";
  module.attr("toolkit_version") = CUDART_VERSION;
  module.def("driver_version", &driver_version,
             "newest CUDA version the installed driver serves, as 1000 * major + 10 * minor; 0 without a driver");
  module.def("handoff_scatter", &handoff_scatter, py::arg("rows"), py::arg("rows_stride"), py::arg("slot_rows"),
             py::arg("count"), py::arg("row_bytes"), py::arg("table"), py::arg("table_stride"), py::arg("table_rows"),
             py::arg("device"), py::arg("stream"), "see link.h");
  module.def("handoff_take", &handoff_take, py::arg("table"), py::arg("table_stride"), py::arg("table_rows"),
             py::arg("slot_rows"), py::arg("count"), py::arg("row_bytes"), py::arg("rows"), py::arg("device"),
             py::arg("stream"), "see link.h");
}
