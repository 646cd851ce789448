// link.h's CPU entries: argument checks, then the kernels of the requested instruction set. Built for the oldest
// processor, like everything outside kernels.cpp.

#include <initializer_list>

#if defined(RECMAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace recmas::cpu {
namespace {

const Kernels* kernels_of(Isa isa) {
  if (isa < Isa::baseline || isa > best_isa()) return nullptr;
  switch (isa) {
#ifdef RECMAS_X86
    case Isa::avx2:
      return &kernels_avx2;
    case Isa::avx512:
      return &kernels_avx512;
    case Isa::avx512_bf16:
      return &kernels_avx512_bf16;
#endif
#ifdef RECMAS_AMX
    case Isa::amx:
      return &kernels_amx;
#endif
    default:
      return &kernels_baseline;
  }
}

bool known(Dtype dtype) { return dtype >= Dtype::f32 && dtype <= Dtype::f16; }

// A 16-bit compute dtype is served with fp32 masters or weights of its own dtype; fp32 with any.
bool serves(const Weight& weight, Dtype compute) {
  return weight.data == nullptr || weight.form == Form::packed || weight.dtype == Dtype::f32 ||
         weight.dtype == compute || compute == Dtype::f32;
}

Status check_link(const LinkConfig& config, const LinkWeights& weights, const MatrixView& x) {
  const LinkShape& s = config.shape;
  if (s.tokens <= 0 || s.in_features <= 0 || s.hidden_features <= 0 || s.out_features <= 0) return Status::bad_argument;
  if (config.threads < 1 || !known(config.compute)) return Status::bad_argument;
  if (weights.w1.data == nullptr || weights.w2.data == nullptr || x.data == nullptr) return Status::bad_argument;
  if ((config.residual == Residual::linear) != (weights.w3.data != nullptr)) return Status::bad_argument;
  if (config.residual == Residual::identity && s.in_features != s.out_features) return Status::bad_argument;
  if (!serves(weights.w1, config.compute) || !serves(weights.w2, config.compute) ||
      !serves(weights.w3, config.compute)) {
    return Status::bad_argument;
  }
  return kernels_of(config.isa) == nullptr ? Status::isa_unavailable : Status::ok;
}

// Rows of a frozen product are of the stored dtype or fp32.
bool reads_frozen(const MatrixView& rows, Dtype stored) {
  return rows.data != nullptr && known(stored) && (rows.dtype == Dtype::f32 || rows.dtype == stored);
}

template <class Call>
Status check_frozen(const Call& call, const void* weight, const MatrixView& rows, const Output& result) {
  if (call.tokens <= 0 || call.in_features <= 0 || call.out_features <= 0 || call.threads < 1) {
    return Status::bad_argument;
  }
  if (weight == nullptr || result.data == nullptr || !reads_frozen(rows, call.stored)) return Status::bad_argument;
  return kernels_of(call.isa) == nullptr ? Status::isa_unavailable : Status::ok;
}

Status check_frozen(const FrozenForward& call) {
  constexpr int64_t kMostStreamed = 16;  // cpu/stream.h
  const bool streamed = call.form == Form::stored && call.tokens <= kMostStreamed;
  if (call.form != Form::packed && !streamed) return Status::bad_argument;
  return check_frozen(call, call.weight, call.x, call.y);
}
Status check_frozen(const FrozenBackward& call) { return check_frozen(call, call.panels, call.dy, call.dx); }

template <class Call>
Status check_layer(const Call& call, std::initializer_list<FrozenWeight> weights) {
  if (call.rows <= 0 || call.rows > most_layer_rows || call.features <= 0 || call.threads < 1) {
    return Status::bad_argument;
  }
  constexpr int64_t kMost = int64_t{1} << 24;  // so that no product of sizes overflows
  if (call.features > kMost || call.heads > kMost || call.head_features > kMost) return Status::bad_argument;
  if (call.key_heads <= 0 || call.heads <= 0 || call.heads % call.key_heads != 0 || call.head_features <= 0 ||
      call.head_features % 2 != 0 || call.queries == nullptr) {
    return Status::bad_argument;
  }
  for (const FrozenWeight& weight : weights) {
    if (weight.panels == nullptr || !reads_frozen(call.x, weight.stored)) return Status::bad_argument;
  }
  return kernels_of(call.isa) == nullptr ? Status::isa_unavailable : Status::ok;
}

Status check_layer(const LayerInputs& call) {
  if (call.norm.gain.data == nullptr || call.cos.data == nullptr || call.sin.data == nullptr ||
      call.keys.data == nullptr || call.values.data == nullptr) {
    return Status::bad_argument;
  }
  return check_layer(call, {call.query, call.key, call.value});
}

Status check_layer(const LayerOutput& call) {
  if (call.activation < Activation::silu || call.activation > Activation::gelu_tanh) return Status::bad_argument;
  if (call.positions <= 0 || call.hidden_features <= 0 || call.keys.data == nullptr || call.values.data == nullptr ||
      call.before_feed.gain.data == nullptr || call.y.data == nullptr || call.y.dtype != call.x.dtype) {
    return Status::bad_argument;
  }
  return check_layer(call, {call.out, call.gate, call.up, call.down});
}

Status check_layers(const DecoderLayer* layers, int64_t count) {
  if (layers == nullptr || count < 1) return Status::bad_argument;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [inputs, output] = layers[i];
    if (const Status status = check_layer(inputs); status != Status::ok) return status;
    if (const Status status = check_layer(output); status != Status::ok) return status;
    if (inputs.isa != layers[0].inputs.isa || output.isa != inputs.isa || output.rows != inputs.rows) {
      return Status::bad_argument;
    }
  }
  return Status::ok;
}

#ifdef RECMAS_X86
// Whether the processor has AMX with bf16, and the system lets this process use its registers. Linux has to be asked
// once for a process: their 8 KB are saved from then on wherever a thread that used them is interrupted.
bool has_tile_registers() {
#if defined(RECMAS_AMX) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;  // of leaf 7's edx
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

Isa best_isa() {
#ifdef RECMAS_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_tile_registers() ? Isa::amx : Isa::avx512_bf16;
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

int64_t packed_bytes(int64_t rows, int64_t columns, Dtype compute, Isa isa) {
  const Kernels* kernels = kernels_of(isa);
  return kernels == nullptr || !known(compute) || rows < 0 || columns < 0
             ? -1
             : kernels->packed_bytes(rows, columns, compute);
}

Status pack_weight(VectorView weight, int64_t rows, int64_t columns, void* packed, Dtype compute, Isa isa,
                   int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return Status::isa_unavailable;
  if (weight.data == nullptr || packed == nullptr || rows <= 0 || columns <= 0 || threads < 1 || !known(compute)) {
    return Status::bad_argument;
  }
  kernels->pack_weight(weight, rows, columns, packed, compute, threads);
  return Status::ok;
}

Status unpack_weight(const void* packed, int64_t rows, int64_t columns, void* weight, Dtype compute, Isa isa,
                     int32_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return Status::isa_unavailable;
  if (weight == nullptr || packed == nullptr || rows <= 0 || columns <= 0 || threads < 1 || !known(compute)) {
    return Status::bad_argument;
  }
  kernels->unpack_weight(packed, rows, columns, weight, compute, threads);
  return Status::ok;
}

int64_t link_forward_workspace(const LinkForward& call) {
  return check_link(call.config, call.weights, call.x) == Status::ok
             ? kernels_of(call.config.isa)->link_forward_workspace(call)
             : -1;
}

Status link_forward(const LinkForward& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_link(call.config, call.weights, call.x);
  if (status != Status::ok) return status;
  if (call.y.data == nullptr) return Status::bad_argument;
  const Kernels* kernels = kernels_of(call.config.isa);
  if (workspace == nullptr || workspace_bytes < kernels->link_forward_workspace(call)) {
    return Status::workspace_too_small;
  }
  kernels->link_forward(call, workspace);
  return Status::ok;
}

int64_t link_backward_workspace(const LinkBackward& call) {
  return check_link(call.config, call.weights, call.x) == Status::ok
             ? kernels_of(call.config.isa)->link_backward_workspace(call)
             : -1;
}

Status link_backward(const LinkBackward& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_link(call.config, call.weights, call.x);
  if (status != Status::ok) return status;
  const bool norm_in = call.weights.norm_in_weight.data != nullptr,
             norm_out = call.weights.norm_out_weight.data != nullptr;
  if (call.dy.data == nullptr || call.pre.data == nullptr || (norm_out && call.z.data == nullptr) ||
      ((norm_in || norm_out) && call.stats == nullptr) || call.weights.w1.form == Form::packed ||
      call.weights.w2.form == Form::packed || call.weights.w3.form == Form::packed) {
    return Status::bad_argument;
  }
  const Kernels* kernels = kernels_of(call.config.isa);
  if (workspace == nullptr || workspace_bytes < kernels->link_backward_workspace(call)) {
    return Status::workspace_too_small;
  }
  kernels->link_backward(call, workspace);
  return Status::ok;
}

int64_t frozen_forward_workspace(const FrozenForward& call) {
  return check_frozen(call) == Status::ok ? kernels_of(call.isa)->frozen_forward_workspace(call) : -1;
}

Status frozen_forward(const FrozenForward& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_frozen(call);
  if (status != Status::ok) return status;
  const Kernels* kernels = kernels_of(call.isa);
  if (workspace_bytes < kernels->frozen_forward_workspace(call)) return Status::workspace_too_small;
  kernels->frozen_forward(call, workspace);
  return Status::ok;
}

int64_t frozen_backward_workspace(const FrozenBackward& call) {
  return check_frozen(call) == Status::ok ? kernels_of(call.isa)->frozen_backward_workspace(call) : -1;
}

Status frozen_backward(const FrozenBackward& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_frozen(call);
  if (status != Status::ok) return status;
  const Kernels* kernels = kernels_of(call.isa);
  if (workspace_bytes < kernels->frozen_backward_workspace(call)) return Status::workspace_too_small;
  kernels->frozen_backward(call, workspace);
  return Status::ok;
}

Status rms_norm(const RmsNorm& call) {
  if (call.rows <= 0 || call.columns <= 0 || call.threads < 1 || call.x.data == nullptr || call.gain.data == nullptr ||
      call.y.data == nullptr || call.y.dtype != call.x.dtype || !known(call.x.dtype) || !known(call.gain.dtype)) {
    return Status::bad_argument;
  }
  const Kernels* kernels = kernels_of(call.isa);
  if (kernels == nullptr) return Status::isa_unavailable;
  kernels->rms_norm(call);
  return Status::ok;
}

int64_t layer_inputs_workspace(const LayerInputs& call) {
  return check_layer(call) == Status::ok ? kernels_of(call.isa)->layer_inputs_workspace(call) : -1;
}

Status layer_inputs(const LayerInputs& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_layer(call);
  if (status != Status::ok) return status;
  const Kernels* kernels = kernels_of(call.isa);
  if (workspace_bytes < kernels->layer_inputs_workspace(call)) return Status::workspace_too_small;
  kernels->layer_inputs(call, workspace);
  return Status::ok;
}

int64_t layer_output_workspace(const LayerOutput& call) {
  return check_layer(call) == Status::ok ? kernels_of(call.isa)->layer_output_workspace(call) : -1;
}

Status layer_output(const LayerOutput& call, void* workspace, int64_t workspace_bytes) {
  const Status status = check_layer(call);
  if (status != Status::ok) return status;
  const Kernels* kernels = kernels_of(call.isa);
  if (workspace_bytes < kernels->layer_output_workspace(call)) return Status::workspace_too_small;
  kernels->layer_output(call, workspace);
  return Status::ok;
}

int64_t decoder_layers_workspace(const DecoderLayer* layers, int64_t count) {
  if (check_layers(layers, count) != Status::ok) return -1;
  return kernels_of(layers[0].inputs.isa)->decoder_layers_workspace(layers, count);
}

Status decoder_layers(const DecoderLayer* layers, int64_t count, void* workspace, int64_t workspace_bytes) {
  const Status status = check_layers(layers, count);
  if (status != Status::ok) return status;
  const Kernels* kernels = kernels_of(layers[0].inputs.isa);
  if (workspace_bytes < kernels->decoder_layers_workspace(layers, count)) return Status::workspace_too_small;
  kernels->decoder_layers(layers, count, workspace);
  return Status::ok;
}

int64_t alignment_workspace(const Alignment& call) {
  const Kernels* kernels = kernels_of(call.isa);
  return kernels == nullptr || call.tokens < 0 ? -1 : kernels->alignment_workspace(call);
}

Status alignment(const Alignment& call, void* workspace, int64_t workspace_bytes) {
  const Kernels* kernels = kernels_of(call.isa);
  if (kernels == nullptr) return Status::isa_unavailable;
  if (call.tokens <= 0 || call.features <= 0 || call.threads < 1 || call.loss == nullptr || call.grad.data == nullptr ||
      call.pred.data == nullptr || call.target.data == nullptr) {
    return Status::bad_argument;
  }
  if (call.token_ids != nullptr) {
    for (int64_t t = 0; t < call.tokens; ++t) {
      if (call.mask != nullptr && call.mask[t] == 0.0f) continue;  // never read
      if (call.token_ids[t] < 0 || call.token_ids[t] >= call.table_rows) return Status::row_out_of_range;
    }
  }
  if (workspace == nullptr || workspace_bytes < kernels->alignment_workspace(call)) return Status::workspace_too_small;
  kernels->alignment(call, workspace);
  return Status::ok;
}

}  // namespace recmas::cpu
