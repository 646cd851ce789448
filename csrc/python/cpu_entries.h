// What recmas_kernels._cpu offers to Python; each entry's arguments stand where it is defined.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace recmas::python {

namespace py = pybind11;

// cpu_link.cpp
PyObject* link_forward(PyObject* const* values, Py_ssize_t count);
PyObject* link_backward(PyObject* const* values, Py_ssize_t count);

// cpu_frozen.cpp
PyObject* frozen_forward(PyObject* const* values, Py_ssize_t count);
PyObject* frozen_backward(PyObject* const* values, Py_ssize_t count);
PyObject* rms_norm(PyObject* const* values, Py_ssize_t count);

// cpu_layer.cpp
PyObject* layer_inputs(PyObject* const* values, Py_ssize_t count);
PyObject* layer_output(PyObject* const* values, Py_ssize_t count);

// cpu_decoder.cpp
PyObject* read_decoder_layers(PyObject* const* values, Py_ssize_t count);
PyObject* decoder_layers(PyObject* const* values, Py_ssize_t count);

// unchanged.cpp
PyObject* unchanged(PyObject* const* values, Py_ssize_t count);
PyObject* read_stand_ins(PyObject* const* values, Py_ssize_t count);
PyObject* versions(PyObject* const* values, Py_ssize_t count);

// cpu_packing.cpp
int64_t packed_bytes(int isa, int compute, int64_t rows, int64_t columns);
void pack_weight(int isa, int threads, int compute, py::handle weight, py::handle packed);
void unpack_weight(int isa, int threads, py::handle packed, py::handle weight);

// cpu_rows.cpp
void handoff_scatter(py::handle rows, py::handle slot_rows, py::handle table);
void handoff_take(py::handle table, py::handle slot_rows, py::handle rows);
void alignment(int isa, int threads, py::handle pred, py::handle target, py::handle token_ids, py::handle mask,
               float cosine_weight, float mse_weight, float embed_scale, py::handle loss, py::handle grad);

}  // namespace recmas::python
