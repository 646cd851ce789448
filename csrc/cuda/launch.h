// How every kernel of this module is launched: with its own return code, and its attributes set once for each device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "../link.h"

namespace recmas::cuda {

// Something that is done once for each device. Doing it twice, as two threads may, does no harm.
class OncePerDevice {
 public:
  template <class Do>
  cudaError_t operator()(Do&& act) {
    int device = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code != cudaSuccess) return code;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
    code = act();
    if (code == cudaSuccess) done_.fetch_or(bit, std::memory_order_release);
    return code;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

// Launches of a link share processors, the first product's with the second's and with the rows' between them. A kernel
// that left more of the unified memory to the cache would have to wait until a processor is empty to change the split.
inline cudaError_t share_processors(const void* kernel, int shared_bytes) {
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, usual_carveout);
  if (code == cudaSuccess && shared_bytes > 0) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  return code;
}

// What link.h's set_launches sets.
struct Launches {
  std::atomic<Overlap> overlap{usual_overlap};
  std::atomic<int32_t> carveout{usual_carveout};
};
inline Launches launches;

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  bool overlaps;  // may start before the kernel ahead has ended
};

// Returns the launch's own error. The runtime remembers it, too, and would report it to whoever asks next.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (grid.overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
#if CUDART_VERSION >= 13000  // before, only the kernel itself could be given a share
  if (const int32_t carveout = launches.carveout; carveout != usual_carveout) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = static_cast<unsigned>(carveout);
  }
#endif
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (code != cudaSuccess) cudaGetLastError();
  return code;
}

}  // namespace recmas::cuda
