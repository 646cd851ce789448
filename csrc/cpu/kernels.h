// What each instruction set's translation unit offers the dispatcher.
#pragma once

#include "../link.h"

namespace recmas::cpu {

struct Kernels {
  int64_t (*packed_bytes)(int64_t rows, int64_t columns, Dtype compute);
  void (*pack_weight)(VectorView weight, int64_t rows, int64_t columns, void* packed, Dtype compute, int32_t threads);
  void (*unpack_weight)(const void* packed, int64_t rows, int64_t columns, void* weight, Dtype compute,
                        int32_t threads);
  int64_t (*link_forward_workspace)(const LinkForward& call);
  void (*link_forward)(const LinkForward& call, void* workspace);
  int64_t (*link_backward_workspace)(const LinkBackward& call);
  void (*link_backward)(const LinkBackward& call, void* workspace);
  int64_t (*frozen_forward_workspace)(const FrozenForward& call);
  void (*frozen_forward)(const FrozenForward& call, void* workspace);
  int64_t (*frozen_backward_workspace)(const FrozenBackward& call);
  void (*frozen_backward)(const FrozenBackward& call, void* workspace);
  void (*rms_norm)(const RmsNorm& call);
  int64_t (*layer_inputs_workspace)(const LayerInputs& call);
  void (*layer_inputs)(const LayerInputs& call, void* workspace);
  int64_t (*layer_output_workspace)(const LayerOutput& call);
  void (*layer_output)(const LayerOutput& call, void* workspace);
  int64_t (*decoder_layers_workspace)(const DecoderLayer* layers, int64_t count);
  void (*decoder_layers)(const DecoderLayer* layers, int64_t count, void* workspace);
  int64_t (*alignment_workspace)(const Alignment& call);
  void (*alignment)(const Alignment& call, void* workspace);
  void (*gelu)(const float* x, int64_t count, Gelu kind, float* value, float* slope);  // for the native tests
};

extern const Kernels kernels_baseline;
#ifdef RECMAS_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif
#ifdef RECMAS_AMX
extern const Kernels kernels_amx;
#endif

}  // namespace recmas::cpu
