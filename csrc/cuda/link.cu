// The link for a few tokens: its two kernels, and their launches as link_plan.h lists them.
#include <atomic>

#include "launch.h"
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

template <class Source, class Parameter, class Target, bool kWhole>
__global__ void __launch_bounds__(kThreads) link_rows(const __grid_constant__ Rows rows) {
  __shared__ __align__(kPiece) char shared[kWarps * sizeof(float)];
  DeviceThread thread(shared);
  run_rows<Source, Parameter, Target, kWhole>(thread, rows);
}

cudaError_t launch(const Rows& rows, cudaStream_t stream) {
  return with_rows_types(rows, [&](auto source, auto parameter, auto target, auto whole) {
    const auto kernel = &link_rows<decltype(source), decltype(parameter), decltype(target), decltype(whole)::value>;
    static OncePerDevice once;
    const cudaError_t code = once([&] { return share_processors(reinterpret_cast<const void*>(kernel), 0); });
    if (code != cudaSuccess) return code;
    return launch(kernel, {rows.tokens, kThreads, 0, rows.overlaps}, stream, rows);
  });
}

cudaError_t launch(const Product& product, cudaStream_t stream) {
  return with_product_types(product, [&](auto element, auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    const auto kernel = &link_product<decltype(element), kGroups>;
    static OncePerDevice once;
    const cudaError_t code = once([&] {
      return share_processors(reinterpret_cast<const void*>(kernel), stages_for(kGroups) * stage_bytes(kGroups));
    });
    if (code != cudaSuccess) return code;
    return launch(kernel, {blocks_of(product), kThreads, shared_bytes(product), product.overlaps}, stream, product);
  });
}

// Whether a kernel may start before the one ahead of it has ended. Asked of the code that the current device runs, not
// of the device: kernels compiled for an older one do not wait.
cudaError_t can_overlap(bool* answer) {
  static OncePerDevice once;
  static std::atomic<bool> overlaps[64];
  int device = 0;
  const cudaError_t code = once([&] {
    cudaFuncAttributes attributes{};
    const cudaError_t failed =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&link_product<Bf16, 1>));
    if (failed == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device < 64) {
      overlaps[device].store(attributes.ptxVersion >= 90);
    }
    return failed;
  });
  if (code != cudaSuccess) return code;
  const cudaError_t unknown = cudaGetDevice(&device);
  *answer = unknown == cudaSuccess && device < 64 && overlaps[device].load();
  return unknown;
}

bool served(const LinkForward& call) {
  const LinkShape& shape = call.shape;
  return shape.tokens > 0 && shape.tokens <= most_link_tokens && shape.in_features > 0 && shape.hidden_features > 0 &&
         shape.out_features > 0 && call.x.data != nullptr && call.y.data != nullptr && call.w1 != nullptr &&
         call.w2 != nullptr && (call.w3 != nullptr) == (call.residual == Residual::linear) && whole_pieces(call) &&
         has_kernels(call);
}

}  // namespace

int64_t link_forward_workspace(const LinkForward& call) { return link_workspace(call).bytes; }

int32_t link_forward(const LinkForward& call, void* workspace, int64_t workspace_bytes, uintptr_t stream_handle) {
  if (!served(call) || workspace_bytes < link_forward_workspace(call)) return cudaErrorInvalidValue;
  bool overlaps = false;
  // A backward pass means weights that learn: those are read in stream order only.
  cudaError_t code = call.stats == nullptr ? can_overlap(&overlaps) : cudaSuccess;
  if (code != cudaSuccess) return code;
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const LinkPlan plan = plan_link(call, workspace, overlaps ? launches.overlap.load() : Overlap::off);
  if (plan.prepares) code = launch(plan.prepare, stream);
  if (code == cudaSuccess) code = launch(plan.first, stream);
  if (code == cudaSuccess) code = launch(plan.second, stream);
  if (code == cudaSuccess && plan.normalises) code = launch(plan.normalise, stream);
  return code;
}

void set_launches(Overlap overlap, int32_t carveout) {
  launches.overlap = overlap;
  launches.carveout = carveout;
}

}  // namespace recmas::cuda
