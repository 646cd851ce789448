// The matrix product of the library that torch multiplies with.
#pragma once

#include "../link.h"

namespace recmas::python {

// MKL's sgemm, as the loaded libtorch_cpu exports it; null where it has another library, or hides it. Called by a
// thread of a parallel region, MKL multiplies in that thread alone, unless nested ones are switched on; other libraries
// may not.
Sgemm* torch_sgemm();

}  // namespace recmas::python
