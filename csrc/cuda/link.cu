// The link for a few tokens: its two kernels, and their launches as link_plan.h lists them.
#include "link_product.h"
#include "link_rows.h"
#include "thread.h"

namespace recmas::cuda {
namespace {

template <class Element, int kGroups>
__global__ void __launch_bounds__(kThreads, 2) link_product(const __grid_constant__ Product product) {
  extern __shared__ __align__(kPiece) char shared[];
  DeviceThread thread(shared);
  run_product<Element, kGroups>(thread, product);
}

__global__ void __launch_bounds__(kThreads) link_rows(const __grid_constant__ Rows rows) {
  __shared__ char shared[kWarps * sizeof(float)];
  DeviceThread thread(shared);
  run_rows(thread, rows);
}

template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int64_t shared,
                   bool overlaps, cudaStream_t stream) {
  constexpr int64_t kUnasked = 48 * 1024;  // of shared memory; more must be asked for
  if (shared > kUnasked) {
    const cudaError_t code = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

cudaError_t launch(const Rows& rows, cudaStream_t stream) {
  return launch(&link_rows, rows, rows.tokens, 0, rows.overlaps, stream);
}

template <class Element>
cudaError_t launch(const Product& product, cudaStream_t stream) {
  const int groups = groups_for(product.tokens);
  const auto kernel = groups == 1   ? &link_product<Element, 1>
                      : groups == 2 ? &link_product<Element, 2>
                                    : &link_product<Element, 4>;
  return launch(kernel, product, blocks_of(product), shared_bytes(product), product.overlaps, stream);
}

cudaError_t launch(const Product& product, cudaStream_t stream) {
  switch (product.compute) {
    case Dtype::f32:
      return launch<float>(product, stream);
    case Dtype::bf16:
      return launch<Bf16>(product, stream);
    default:
      return launch<F16>(product, stream);
  }
}

// Whether a kernel may start before the one ahead of it has ended. Asked of the code that the current device runs, not
// of the device: kernels compiled for an older one do not wait.
cudaError_t can_overlap(bool* answer) {
  cudaFuncAttributes attributes{};
  const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&link_rows));
  *answer = attributes.ptxVersion >= 90;
  return code;
}

bool served(const LinkForward& call) {
  const LinkShape& shape = call.shape;
  return shape.tokens > 0 && shape.tokens <= most_link_tokens && shape.in_features > 0 && shape.hidden_features > 0 &&
         shape.out_features > 0 && call.x.data != nullptr && call.y.data != nullptr && call.w1 != nullptr &&
         call.w2 != nullptr && (call.w3 != nullptr) == (call.residual == Residual::linear);
}

}  // namespace

int64_t link_forward_workspace(const LinkForward& call) { return link_workspace(call).bytes; }

int32_t link_forward(const LinkForward& call, void* workspace, int64_t workspace_bytes, uintptr_t stream_handle) {
  if (!served(call) || workspace_bytes < link_forward_workspace(call)) return cudaErrorInvalidValue;
  bool overlap = false;
  // A backward pass means weights that learn: those are read in stream order only.
  cudaError_t code = call.stats == nullptr ? can_overlap(&overlap) : cudaSuccess;
  if (code != cudaSuccess) return code;
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const LinkPlan plan = plan_link(call, workspace, overlap);
  if (plan.prepares) code = launch(plan.prepare, stream);
  if (code == cudaSuccess) code = launch(plan.first, stream);
  if (code == cudaSuccess) code = launch(plan.second, stream);
  if (code == cudaSuccess && plan.normalises) code = launch(plan.normalise, stream);
  return code;
}

}  // namespace recmas::cuda
