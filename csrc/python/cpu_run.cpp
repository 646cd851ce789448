#include "cpu_run.h"

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

}  // namespace recmas::python
