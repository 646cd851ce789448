// recmas_kernels._tensors: one look at all tensors of a link, for tensors on any device. No kernels.
#include <pybind11/pybind11.h>

#include "arguments.h"
#include "link_arguments.h"
#include "plain_link.h"
#include "tensors.h"

namespace {

using namespace recmas::python;

// is_plain_link(LinkArguments, mixed) -> bool
PyObject* plain_link(PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 2, "is_plain_link");
  const LinkArguments link = read_link_arguments(arguments.object());
  const bool mixed = arguments.object() == Py_True;
  try {
    return PyBool_FromLong(is_plain_link(link, mixed, reader()));
  } catch (py::error_already_set&) {  // such as a sparse or a meta tensor, which has no address
    Py_RETURN_FALSE;
  }
}

PyMethodDef fast_entries[] = {
    fast<&plain_link>("is_plain_link"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_tensors, module) {
  module.doc() = "Looks at a link's tensors; recmas_kernels.backends.tensors is the only caller.";
  module.attr("sources") = RECMAS_SOURCES;
  module.def("connect", [](const py::module_& torch, const py::object& table) { reader().connect(torch, table); });
  if (PyModule_AddFunctions(module.ptr(), fast_entries) != 0) throw py::error_already_set();
}
