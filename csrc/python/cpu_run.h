// Running a CPU kernel for Python: without the GIL, with scratch memory, a status that is not ok raised as an
// exception.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../link.h"
#include "tensors.h"

namespace recmas::python {

// Throws what `status` of the native function `entry` means, unless it is ok.
void check(Status status, const char* entry);

// Advice that scratch memory be mapped in pages of 2 MB where it is so much that the C library maps it anew each time:
// a link of 1024 tokens, 2048 wide, spent a tenth of its backward pass on small ones.
void ask_for_large_pages(void* memory, int64_t bytes);

template <class Run>
void run(const char* entry, const Run& body) {
  Status status;
  {
    py::gil_scoped_release released;
    status = body();
  }
  check(status, entry);
}

// `body(workspace, bytes)` with scratch memory: the stack's if it is little, else a tensor's.
template <class Run>
void run_in(int64_t bytes, const char* entry, const Run& body) {
  constexpr int64_t kOnStack = 4096;
  if (bytes <= kOnStack) {
    alignas(64) char scratch[kOnStack];
    run(entry, [&] { return body(static_cast<void*>(scratch), kOnStack); });
  } else {
    const py::object tensor = reader().allocate(bytes);
    void* const scratch = reader().read(tensor.ptr()).data;
    ask_for_large_pages(scratch, bytes);
    run(entry, [&] { return body(scratch, bytes); });
  }
}

}  // namespace recmas::python
