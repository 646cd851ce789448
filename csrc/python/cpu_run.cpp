#include "cpu_run.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>

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

}  // namespace recmas::python
