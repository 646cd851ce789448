// Compiled once per instruction set; see types.h.
#include "kernels.h"

#include "alignment.h"
#include "frozen.h"
#include "layer.h"
#include "link_backward.h"
#include "rms_norm.h"

#define RECMAS_JOIN_NAMES(a, b) a##b
#define RECMAS_JOIN(a, b) RECMAS_JOIN_NAMES(a, b)

namespace recmas::cpu::RECMAS_ISA {
namespace {

int64_t packed_bytes(int64_t rows, int64_t columns, Dtype compute) {
  return panel_count(rows) * panel_bytes(packed_format(compute), columns);
}

void pack_weight(VectorView weight, int64_t rows, int64_t columns, void* packed, Dtype compute, int32_t threads) {
  const Right right{weight.data, weight.dtype, columns, Layout::columns, Form::stored, columns, rows, compute};
  const Format format = packed_format(compute);
  const int64_t panels = panel_count(rows), bytes = panel_bytes(format, columns);
  run_team(smaller(threads, panels), [&](const Team& team) {
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      pack_panel(right, panel * kPanel, format, static_cast<char*>(packed) + panel * bytes);
    }
  });
}

void unpack_weight(const void* packed, int64_t rows, int64_t columns, void* weight, Dtype compute, int32_t threads) {
  const Format format = packed_format(compute);
  const int64_t panels = panel_count(rows), bytes = panel_bytes(format, columns);
  run_team(smaller(threads, panels), [&](const Team& team) {
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      const int64_t row = panel * kPanel;
      unpack_panel(static_cast<const char*>(packed) + panel * bytes, format, columns, smaller(kPanel, rows - row),
                   static_cast<char*>(weight) + row * columns * dtype_bytes(compute));
    }
  });
}

void gelu_and_slope(const float* x, int64_t count, Gelu kind, float* value, float* slope) {
  each_vector(count, [&](int64_t i, auto lanes) {
    Vec activation;
    store(slope + i, gelu_gradient(load(x + i, lanes), kind, &activation), lanes);
    store(value + i, activation, lanes);
  });
}

}  // namespace
}  // namespace recmas::cpu::RECMAS_ISA

namespace recmas::cpu {

extern const Kernels RECMAS_JOIN(kernels_, RECMAS_ISA) = {
    RECMAS_ISA::packed_bytes,
    RECMAS_ISA::pack_weight,
    RECMAS_ISA::unpack_weight,
    RECMAS_ISA::link_forward_workspace,
    RECMAS_ISA::link_forward,
    RECMAS_ISA::link_backward_workspace,
    RECMAS_ISA::link_backward,
    RECMAS_ISA::frozen_forward_workspace,
    RECMAS_ISA::frozen_forward,
    RECMAS_ISA::frozen_backward_workspace,
    RECMAS_ISA::frozen_backward,
    RECMAS_ISA::rms_norm,
    RECMAS_ISA::layer_inputs_workspace,
    RECMAS_ISA::layer_inputs,
    RECMAS_ISA::layer_output_workspace,
    RECMAS_ISA::layer_output,
    RECMAS_ISA::decoder_layers_workspace,
    RECMAS_ISA::decoder_layers,
    RECMAS_ISA::alignment_workspace,
    RECMAS_ISA::alignment,
    RECMAS_ISA::gelu_and_slope,
};

}  // namespace recmas::cpu
