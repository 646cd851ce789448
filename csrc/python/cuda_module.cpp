// recmas_kernels._cuda: link.h's CUDA entries for Python. Addresses come as integers; the GIL is released during a
// launch; an error code becomes an exception.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "../link.h"

namespace py = pybind11;

namespace {

using recmas::Dtype;
using Sizes = std::array<int64_t, 4>;  // tokens, in, hidden and out features

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

recmas::LinkShape shape_of(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }

void raise_if_failed(int32_t code, const std::string& op, int device) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  throw std::runtime_error(op + " on cuda:" + std::to_string(device) + ": CUDA error " + std::to_string(code) + " (" +
                           cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

// Any non-null address stands for "present": the workspace depends on sizes alone.
int64_t link_forward_workspace(Sizes sizes, int compute, bool norm_in, bool norm_out) {
  static const char present = 0;
  recmas::cuda::LinkForward call{};
  call.shape = shape_of(sizes);
  call.compute = static_cast<Dtype>(compute);
  if (norm_in) call.norm_in_weight.data = &present;
  if (norm_out) call.norm_out_weight.data = &present;
  return recmas::cuda::link_forward_workspace(call);
}

void link_forward(Sizes sizes, int compute, int residual, int gelu, float eps, uintptr_t x, int64_t x_stride,
                  int x_dtype, const std::array<uintptr_t, 3>& weights,
                  const std::array<std::pair<uintptr_t, int>, 7>& vectors, const std::array<uintptr_t, 4>& outputs,
                  uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
  recmas::cuda::LinkForward call{};
  call.shape = shape_of(sizes);
  call.compute = static_cast<Dtype>(compute);
  call.residual = static_cast<recmas::Residual>(residual);
  call.gelu = static_cast<recmas::Gelu>(gelu);
  call.eps = eps;
  call.x = {pointer<const void>(x), x_stride, static_cast<Dtype>(x_dtype)};
  call.w1 = pointer<const void>(weights[0]);
  call.w2 = pointer<const void>(weights[1]);
  call.w3 = pointer<const void>(weights[2]);
  recmas::VectorView* const views[7] = {
      &call.b1,           &call.b2, &call.b3, &call.norm_in_weight, &call.norm_in_bias, &call.norm_out_weight,
      &call.norm_out_bias};
  for (size_t i = 0; i < 7; ++i)
    *views[i] = {pointer<const void>(vectors[i].first), static_cast<Dtype>(vectors[i].second)};
  call.y = {pointer<void>(outputs[0]), call.x.dtype};
  call.pre = {pointer<void>(outputs[1]), call.compute};
  call.z = {pointer<void>(outputs[2]), call.compute};
  call.stats = pointer<float>(outputs[3]);
  int32_t code = 0;
  {
    const py::gil_scoped_release unlocked;
    code = recmas::cuda::link_forward(call, pointer<void>(workspace), workspace_bytes, stream);
  }
  if (code == cudaSuccess) return;
  const auto size = [&sizes](size_t i) { return std::to_string(sizes[i]); };
  raise_if_failed(code, "link_forward " + size(0) + " x " + size(1) + " -> " + size(2) + " -> " + size(3), device);
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
  module.attr("sources") = RECMAS_SOURCES;
  module.attr("toolkit_version") = CUDART_VERSION;
  module.attr("architectures") = RECMAS_ARCHITECTURES;
  module.def("driver_version", &driver_version,
             "newest CUDA version the installed driver serves, as 1000 * major + 10 * minor; 0 without a driver");
  module.attr("most_link_tokens") = recmas::cuda::most_link_tokens;
  module.def(
      "set_launches",
      [](const std::string& overlap, int32_t carveout) {
        if (overlap != "off" && overlap != "late" && overlap != "early") {
          throw std::invalid_argument("overlap: " + overlap + ", expected off, late or early");
        }
        if (carveout < 0 || carveout > 100) {
          throw std::invalid_argument("carveout: " + std::to_string(carveout) + ", expected a percentage");
        }
        if (carveout != recmas::cuda::usual_carveout && CUDART_VERSION < 13000) {
          throw std::invalid_argument("carveout: a module built with CUDA 12 asks for 100 percent");
        }
        recmas::cuda::set_launches(overlap == "off"    ? recmas::cuda::Overlap::off
                                   : overlap == "late" ? recmas::cuda::Overlap::late
                                                       : recmas::cuda::Overlap::early,
                                   carveout);
      },
      py::arg("overlap") = "early", py::arg("carveout") = recmas::cuda::usual_carveout,
      "how later links of this process are launched, for benchmarks; see link.h");
  module.def("link_forward_workspace", &link_forward_workspace, py::arg("sizes"), py::arg("compute"),
             py::arg("norm_in"), py::arg("norm_out"), "bytes that link_forward needs beside its tensors");
  module.def("link_forward", &link_forward, py::arg("sizes"), py::arg("compute"), py::arg("residual"), py::arg("gelu"),
             py::arg("eps"), py::arg("x"), py::arg("x_stride"), py::arg("x_dtype"), py::arg("weights"),
             py::arg("vectors"), py::arg("outputs"), py::arg("workspace"), py::arg("workspace_bytes"),
             py::arg("device"), py::arg("stream"),
             "sizes: tokens, in, hidden, out; weights: w1, w2, w3; vectors: (address, dtype) of b1, b2, b3 and the "
             "norms' weights and biases; outputs: y, pre, z, stats; 0 for what is absent; see link.h");
}
