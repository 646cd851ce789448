// Whether the tensors of a link need a closer look before a kernel reads them.
#pragma once

#include "link_arguments.h"
#include "tensors.h"

namespace recmas::python {

// Whether x and the parameters are plain tensors on one device that fit each other and need no conversion. `mixed`:
// parameters may have another floating-point type than x. False says no more than that the caller has to look closely.
//
// A conjugated tensor is complex, so it never fits. Whether x is a negated view is for the caller to check; parameters
// are not checked for it.
bool is_plain_link(const LinkArguments& arguments, bool mixed, const Reader& reader);

}  // namespace recmas::python
