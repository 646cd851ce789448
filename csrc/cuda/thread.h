// A thread of a block on the device: what the kernels' bodies ask of one, as single instructions.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "number.h"

namespace recmas::cuda {

// On sm_90 and newer a kernel may be launched while the one before it still runs (programmatic dependent launch); the
// older chips never do, so there is nothing to wait for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RECMAS_OVERLAPS 1
#else
#define RECMAS_OVERLAPS 0
#endif

class DeviceThread {
 public:
  __device__ explicit DeviceThread(char* shared) : shared_(shared) {}

  __device__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t block() const { return blockIdx.x; }
  __device__ char* shared() const { return shared_; }

  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ float shuffle_xor(float value, int mask) const { return __shfl_xor_sync(0xffffffffu, value, mask); }

  // The next kernel of the stream may be started now; it waits for this one's end before it reads its results.
  __device__ void start_dependents() const {
#if RECMAS_OVERLAPS
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  }
  // Until the kernel before has ended and all that it wrote can be seen.
  __device__ void wait_for_previous() const {
#if RECMAS_OVERLAPS
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }

  __device__ float load(const void* data, Dtype dtype, int64_t index) const { return load_number(data, dtype, index); }
  template <class Element>
  __device__ uint32_t load_bits(const Element* source) const {
    if constexpr (sizeof(Element) == 4) {
      return bits_as<uint32_t>(*source);
    } else {
      return static_cast<uint32_t>(source->bits);
    }
  }
  __device__ void store(void* data, Dtype dtype, int64_t index, float value) const {
    store_number(data, dtype, index, value);
  }

  // Copies 16 bytes to shared memory, or zeroes them; source must be an address even where it is not read.
  __device__ void copy_async(void* target, const void* source, bool inside) const {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    const uint32_t bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes)
                 : "memory");
  }
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  __device__ void wait_for_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // sums [16 rows, 8 tokens] += rows [16, 16] columns [16, 8], spread over the warp as mma.m16n8k16 wants them.
  template <class Element>
  __device__ void multiply_tile(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]) const {
    if constexpr (sizeof(Element) == 2) {
#define RECMAS_MMA(type)                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                  \
               "{%8, %9}, {%0, %1, %2, %3};"                                \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
               : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]))
      if constexpr (std::is_same_v<Element, Bf16>) {
        RECMAS_MMA("bf16");
      } else {
        RECMAS_MMA("f16");
      }
#undef RECMAS_MMA
    }
  }

 private:
  char* shared_;
};

}  // namespace recmas::cuda
