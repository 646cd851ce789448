// recmas_kernels._cpu: link.h's CPU entries for Python. Tensors come as they are and are read by tensors.h; dtypes and
// instruction sets come as link.h's numbers. The caller allocates what is written.
#include <pybind11/pybind11.h>

#include "../link.h"
#include "arguments.h"
#include "cpu_entries.h"
#include "cpu_library.h"
#include "cpu_run.h"
#include "tensors.h"

namespace {

using namespace recmas::python;

PyMethodDef fast_entries[] = {
    fast<&link_forward>("link_forward"),
    fast<&link_backward>("link_backward"),
    fast<&frozen_forward>("frozen_forward"),
    fast<&frozen_backward>("frozen_backward"),
    fast<&rms_norm>("rms_norm"),
    fast<&layer_inputs>("layer_inputs"),
    fast<&layer_output>("layer_output"),
    fast<&read_decoder_layers>("read_decoder_layers"),
    fast<&decoder_layers>("decoder_layers"),
    fast<&unchanged>("unchanged"),
    fast<&read_stand_ins>("read_stand_ins"),
    fast<&versions>("versions"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels over torch tensors; recmas_kernels.backends.cpu is the only caller.";
  module.attr("sources") = RECMAS_SOURCES;
  module.def("connect", [](const py::module_& torch, const py::object& table) { reader().connect(torch, table); });
  if (PyModule_AddFunctions(module.ptr(), fast_entries) != 0) throw py::error_already_set();
  module.def("best_isa", [] { return static_cast<int>(recmas::cpu::best_isa()); });
  module.def("multiplies_by_library", [] { return torch_sgemm() != nullptr; });
  module.def("keep_scratch", &Scratch::keep);
  module.def("packed_bytes", &packed_bytes);
  module.def("pack_weight", &pack_weight);
  module.def("unpack_weight", &unpack_weight);
  module.def("handoff_scatter", &handoff_scatter);
  module.def("handoff_take", &handoff_take);
  module.def("alignment", &alignment);
}
