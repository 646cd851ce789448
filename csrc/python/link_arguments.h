// recmas_kernels.reference.LinkArguments, the Python tuple in which a link's tensors and settings reach every backend.
#pragma once

#include <pybind11/pybind11.h>

#include "../link.h"
#include "tensors.h"

namespace recmas::python {

// The tuple's items in their order, borrowed from it; an absent tensor is None.
struct LinkArguments {
  PyObject *x, *w1, *b1, *w2, *b2, *w3, *b3, *norm_in_weight, *norm_in_bias, *norm_out_weight, *norm_out_bias;
  PyObject *residual, *gelu, *eps, *dtype;
};

// Throws TypeError for anything but a tuple of this many items.
LinkArguments read_link_arguments(PyObject* tuple);

// Whether `text` is the Python string `ascii`.
bool equals(PyObject* text, const char* ascii);

struct LinkSettings {
  Residual residual;
  Gelu gelu;
  float eps;
  Dtype compute;
};

// The four settings as link.h has them. Throws ValueError for a name that it does not have.
LinkSettings read_settings(const LinkArguments& arguments, const Reader& reader);

}  // namespace recmas::python
