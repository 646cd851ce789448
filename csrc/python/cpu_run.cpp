#include "cpu_run.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <utility>

namespace recmas::python {

void check(Status status, const char* entry) {
  switch (status) {
    case Status::ok:
      return;
    case Status::isa_unavailable:
      throw std::runtime_error(std::string(entry) + ": this processor or build lacks the instruction set asked for");
    case Status::workspace_too_small:
      throw std::runtime_error(std::string(entry) + ": the workspace is too small");
    case Status::row_out_of_range:
      throw py::index_error(std::string(entry) + ": a slot row or token id is out of range");
    default:
      throw std::runtime_error(std::string(entry) + ": an argument is not served (status " +
                               std::to_string(static_cast<int>(status)) + ")");
  }
}

namespace {

int64_t most_kept = 64 << 20;

struct Piece {
  PyObject* tensor = nullptr;
  int64_t bytes = 0;
};
Piece kept;  // the GIL guards it

// Advice that memory be mapped in pages of 2 MB where the C library maps it anew each time: a link of 1024 tokens, 2048
// wide, spent a tenth of its backward pass on small ones.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kAlwaysMapped = 32 << 20;  // the most that glibc keeps for the next allocation
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kAlwaysMapped) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // without them small pages serve
#endif
}

}  // namespace

int64_t Scratch::keep(int64_t most_bytes) {
  Py_XDECREF(std::exchange(kept, {}).tensor);
  return std::exchange(most_kept, most_bytes);
}

Scratch::Scratch(int64_t bytes) {
  if (kept.bytes >= bytes) {
    tensor_ = kept.tensor;
    bytes_ = kept.bytes;
    kept = {};
    data_ = reader().read(tensor_).data;
    return;
  }
  py::object tensor = reader().allocate(bytes);
  data_ = reader().read(tensor.ptr()).data;
  ask_for_large_pages(data_, bytes);
  bytes_ = bytes;
  tensor_ = tensor.release().ptr();
}

Scratch::~Scratch() {
  if (bytes_ <= most_kept && bytes_ > kept.bytes) {
    std::swap(tensor_, kept.tensor);
    kept.bytes = bytes_;
  }
  Py_XDECREF(tensor_);
}

}  // namespace recmas::python
