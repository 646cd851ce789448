// Native functions that take their positional arguments as an array (METH_FASTCALL): for an entry that every call of a
// link goes through, pybind11's own conversion of a dozen arguments costs more than a small kernel.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace recmas::python {

namespace py = pybind11;

// The arguments of one call, read in order.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* entry) : next_(values) {
    if (count != expected) {
      throw py::type_error(std::string(entry) + ": expected " + std::to_string(expected) + " arguments, got " +
                           std::to_string(count));
    }
  }

  PyObject* object() { return *next_++; }

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(object());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  float number() {
    const double value = PyFloat_AsDouble(object());
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
  }

 private:
  PyObject* const* next_;
};

using Entry = PyObject* (*)(PyObject* const* values, Py_ssize_t count);

// What Python calls: runs the entry, and turns a C++ exception into Python's.
template <Entry entry>
PyObject* called(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    return entry(values, count);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A row of a module's table of functions, which ends with a row of zeros.
template <Entry entry>
constexpr PyMethodDef fast(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called<entry>)), METH_FASTCALL, nullptr};
}

}  // namespace recmas::python
