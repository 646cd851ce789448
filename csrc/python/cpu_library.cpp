#include "cpu_library.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace recmas::python {

Sgemm* torch_sgemm() {
#ifdef __linux__
  static Sgemm* const found = []() -> Sgemm* {
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr || dlsym(torch, "MKL_Get_Version_String") == nullptr) return nullptr;
    return reinterpret_cast<Sgemm*>(dlsym(torch, "sgemm_"));
  }();
  return found;
#else
  return nullptr;
#endif
}

}  // namespace recmas::python
