// Whether Python objects are what they were: for modules that a kernel stands for, at every call of it.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu_entries.h"
#include "stand_ins.h"
#include "tensors.h"

namespace recmas::python {

namespace {

// Of `width` objects in a row.
PyObject* rows(PyObject* object, Py_ssize_t width) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) % width != 0) {
    throw py::type_error("unchanged: expected tuples of " + std::to_string(width) + " objects in a row");
  }
  return object;
}

// What an object is, or what a weak reference stands for; None once that is gone.
PyObject* meant(PyObject* object) { return PyWeakref_Check(object) ? PyWeakref_GetObject(object) : object; }

// A dictionary; of an object that a weak reference stands for, its own.
py::object dictionary(PyObject* object) {
  if (PyDict_Check(object)) return py::reinterpret_borrow<py::object>(object);
  PyObject* const held = PyObject_GenericGetDict(meant(object), nullptr);
  if (held == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(held);
}

bool holds(PyObject* watched, PyObject* key, PyObject* value) {
  PyObject* const found = PyDict_GetItemWithError(dictionary(watched).ptr(), key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found == meant(value);
}

// The number that CPython gives a dictionary at each of its changes, which no other dictionary has or had. Gone
// from 3.12.
#if PY_VERSION_HEX < 0x030C0000
constexpr bool kVersions = true;
uint64_t version(PyObject* held) { return reinterpret_cast<PyDictObject*>(held)->ma_version_tag; }
#else
constexpr bool kVersions = false;
uint64_t version(PyObject*) { return 0; }
#endif

constexpr const char* kStandIns = "recmas_kernels.stand_ins";

}  // namespace

// read_stand_ins(tensors) -> what unchanged takes, of tensors that hold one element for all.
PyObject* read_stand_ins(PyObject* const* values, Py_ssize_t count) {
  if (count != 1) throw py::type_error("read_stand_ins: expected tensors");
  auto found = std::make_unique<StandIns>(rows(values[0], 1));
  const auto forget = [](PyObject* capsule) {
    delete static_cast<StandIns*>(PyCapsule_GetPointer(capsule, kStandIns));
  };
  PyObject* const capsule = PyCapsule_New(found.get(), kStandIns, forget);
  if (capsule != nullptr) static_cast<void>(found.release());
  return capsule;
}

// versions(places) -> bytes: of the dictionaries that `places` are or stand for; None if this Python has none.
PyObject* versions(PyObject* const* values, Py_ssize_t count) {
  if (count != 1) throw py::type_error("versions: expected places");
  if (!kVersions) Py_RETURN_NONE;
  PyObject* const places = rows(values[0], 1);
  std::vector<uint64_t> found(static_cast<size_t>(PyTuple_GET_SIZE(places)));
  for (size_t i = 0; i < found.size(); ++i) {
    PyObject* const place = PyTuple_GET_ITEM(places, static_cast<Py_ssize_t>(i));
    found[i] = version(PyDict_Check(place) ? place : dictionary(place).ptr());
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.data()),
                                   static_cast<Py_ssize_t>(found.size() * sizeof(uint64_t)));
}

// unchanged(entries, sizes, kinds, classes, stand_ins): whether each dictionary still has that very value under that
// key (entries: three in a row) and as many keys (sizes: two), each object is of that class and has that dictionary, if
// not None (kinds: three), each class has that attribute (classes: three), and each tensor holds one element for
// all (stand_ins: what read_stand_ins returned). A weak reference stands for its object, or for that object's
// dictionary. 15 ns each, or a miss of the caches; a loop in Python takes five times as long, and a layer has a
// hundred.
PyObject* unchanged(PyObject* const* values, Py_ssize_t count) {
  if (count != 5) throw py::type_error("unchanged: expected entries, sizes, kinds, classes and stand-ins");
  PyObject *const entries = rows(values[0], 3), *const sizes = rows(values[1], 2), *const kinds = rows(values[2], 3);
  PyObject* const classes = rows(values[3], 3);
  auto* const stand_ins = static_cast<StandIns*>(PyCapsule_GetPointer(values[4], kStandIns));
  if (stand_ins == nullptr) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes); i += 2) {
    const Py_ssize_t size = PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i + 1));
    if (PyDict_Size(dictionary(PyTuple_GET_ITEM(sizes, i)).ptr()) != size) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds); i += 3) {
    PyObject *const object = meant(PyTuple_GET_ITEM(kinds, i)), *const held = PyTuple_GET_ITEM(kinds, i + 2);
    const auto* const kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (kind != PyTuple_GET_ITEM(kinds, i + 1)) Py_RETURN_FALSE;
    const auto has = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
    if (!has) throw py::error_already_set();
    if (held != Py_None && has.ptr() != held) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); i += 3) {
    PyObject* const found = PyObject_GetAttr(PyTuple_GET_ITEM(classes, i), PyTuple_GET_ITEM(classes, i + 1));
    if (found == nullptr) PyErr_Clear();  // it was deleted
    const bool same = found == PyTuple_GET_ITEM(classes, i + 2);
    Py_XDECREF(found);
    if (!same) Py_RETURN_FALSE;
  }
  if (!stand_ins->hold()) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(entries); i += 3) {
    if (!holds(PyTuple_GET_ITEM(entries, i), PyTuple_GET_ITEM(entries, i + 1), PyTuple_GET_ITEM(entries, i + 2))) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

}  // namespace recmas::python
