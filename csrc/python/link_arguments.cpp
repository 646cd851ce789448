#include "link_arguments.h"

#include <string>

namespace recmas::python {

namespace {

[[noreturn]] void refuse(const char* name, PyObject* value, const char* expected) {
  throw py::value_error(std::string(name) + " is " + std::string(py::repr(value)) + ", expected " + expected);
}

}  // namespace

LinkArguments read_link_arguments(PyObject* tuple) {
  constexpr Py_ssize_t kItems = 15;
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kItems) {
    throw py::type_error(std::string("expected LinkArguments, got ") + Py_TYPE(tuple)->tp_name);
  }
  const auto item = [tuple](Py_ssize_t index) { return PyTuple_GET_ITEM(tuple, index); };
  return {item(0), item(1), item(2),  item(3),  item(4),  item(5),  item(6), item(7),
          item(8), item(9), item(10), item(11), item(12), item(13), item(14)};
}

bool equals(PyObject* text, const char* ascii) {
  return PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, ascii) == 0;
}

LinkSettings read_settings(const LinkArguments& arguments, const Reader& reader) {
  LinkSettings settings{};
  if (equals(arguments.residual, "identity")) {
    settings.residual = Residual::identity;
  } else if (equals(arguments.residual, "linear")) {
    settings.residual = Residual::linear;
  } else if (!equals(arguments.residual, "none")) {
    refuse("residual", arguments.residual, "'identity', 'linear' or 'none'");
  }
  if (equals(arguments.gelu, "tanh")) {
    settings.gelu = Gelu::tanh;
  } else if (!equals(arguments.gelu, "none")) {
    refuse("gelu", arguments.gelu, "'none' or 'tanh'");
  }
  const double eps = PyFloat_AsDouble(arguments.eps);
  if (eps == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  settings.eps = static_cast<float>(eps);
  const int32_t compute = reader.dtype_of(arguments.dtype);
  if (compute == View::kOther) refuse("dtype", arguments.dtype, "torch.float32, torch.bfloat16 or torch.float16");
  settings.compute = static_cast<Dtype>(compute);
  return settings;
}

}  // namespace recmas::python
