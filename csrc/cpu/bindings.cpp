// recmas_kernels._cpu: link.h's CPU entries for Python. Tensors come as addresses and sizes, 0 for an absent one;
// dtypes, residual and gelu kinds as link.h's numbers. The GIL is released while a kernel runs; a status that is not
// ok becomes an exception. The caller (recmas_kernels/backends/cpu.py) keeps the tensors alive and has checked them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../link.h"

namespace py = pybind11;

namespace {

using namespace recmas;

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

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

template <class Run>
void run(const char* entry, const Run& body) {
  Status status;
  {
    py::gil_scoped_release released;
    status = body();
  }
  check(status, entry);
}

cpu::LinkConfig config_of(int isa, int threads, int compute, int residual, int gelu, float eps, int64_t tokens,
                          int64_t in_features, int64_t hidden_features, int64_t out_features) {
  return {{tokens, in_features, hidden_features, out_features},
          static_cast<Residual>(residual),
          static_cast<Gelu>(gelu),
          eps,
          static_cast<Dtype>(compute),
          static_cast<Isa>(isa),
          threads};
}

cpu::Weight weight_of(Address data, int dtype, int form) {
  return {pointer<const void>(data), static_cast<Dtype>(dtype), static_cast<cpu::Form>(form)};
}

VectorView vector_of(Address data, int dtype) { return {pointer<const void>(data), static_cast<Dtype>(dtype)}; }

MatrixView matrix_of(Address data, int64_t stride, int dtype) {
  return {pointer<const void>(data), stride, static_cast<Dtype>(dtype)};
}

Output output_of(Address data, int dtype) { return {pointer<void>(data), static_cast<Dtype>(dtype)}; }

// Sizes, storage types and which parts exist decide the workspace; any non-null address stands for "present".
// Every bias is taken as present: at most a few unused bytes.
cpu::LinkWeights present_weights(bool linear, bool norm_in, bool norm_out, bool narrow_vectors) {
  static const char present = 0;
  const VectorView vector{&present, narrow_vectors ? Dtype::bf16 : Dtype::f32};
  cpu::LinkWeights weights{};
  weights.w1.data = weights.w2.data = &present;
  if (linear) weights.w3.data = &present;
  weights.b1 = weights.b2 = weights.b3 = vector;
  if (norm_in) weights.norm_in_weight = weights.norm_in_bias = vector;
  if (norm_out) weights.norm_out_weight = weights.norm_out_bias = vector;
  return weights;
}

int64_t link_forward_workspace(int isa, int threads, int compute, int residual, int64_t tokens, int64_t in_features,
                               int64_t hidden_features, int64_t out_features, bool norm_in, bool norm_out, int form1,
                               int form2, int form3, bool narrow_vectors) {
  static const char present = 0;
  cpu::LinkForward call{};
  call.config = config_of(isa, threads, compute, residual, 0, 0.0f, tokens, in_features, hidden_features, out_features);
  call.weights = present_weights(call.config.residual == Residual::linear, norm_in, norm_out, narrow_vectors);
  call.weights.w1.form = static_cast<cpu::Form>(form1);
  call.weights.w2.form = static_cast<cpu::Form>(form2);
  call.weights.w3.form = static_cast<cpu::Form>(form3);
  call.x.data = &present;
  return cpu::link_forward_workspace(call);
}

void link_forward(int isa, int threads, int compute, int residual, int gelu, float eps, int64_t tokens,
                  int64_t in_features, int64_t hidden_features, int64_t out_features, Address x, int64_t x_stride,
                  int x_dtype, Address w1, int w1_dtype, int w1_form, Address b1, int b1_dtype, Address w2,
                  int w2_dtype, int w2_form, Address b2, int b2_dtype, Address w3, int w3_dtype, int w3_form,
                  Address b3, int b3_dtype, Address norm_in_weight, int norm_in_weight_dtype, Address norm_in_bias,
                  int norm_in_bias_dtype, Address norm_out_weight, int norm_out_weight_dtype, Address norm_out_bias,
                  int norm_out_bias_dtype, Address y, Address pre, Address z, Address stats, Address workspace,
                  int64_t workspace_bytes) {
  cpu::LinkForward call{};
  call.config =
      config_of(isa, threads, compute, residual, gelu, eps, tokens, in_features, hidden_features, out_features);
  call.weights = {weight_of(w1, w1_dtype, w1_form),
                  weight_of(w2, w2_dtype, w2_form),
                  weight_of(w3, w3_dtype, w3_form),
                  vector_of(b1, b1_dtype),
                  vector_of(b2, b2_dtype),
                  vector_of(b3, b3_dtype),
                  vector_of(norm_in_weight, norm_in_weight_dtype),
                  vector_of(norm_in_bias, norm_in_bias_dtype),
                  vector_of(norm_out_weight, norm_out_weight_dtype),
                  vector_of(norm_out_bias, norm_out_bias_dtype)};
  call.x = matrix_of(x, x_stride, x_dtype);
  call.y = output_of(y, x_dtype);
  call.pre = output_of(pre, compute);
  call.z = output_of(z, compute);
  call.stats = pointer<float>(stats);
  run("link_forward", [&] { return cpu::link_forward(call, pointer<void>(workspace), workspace_bytes); });
}

// A sequence of (address, dtype) pairs; the backward pass has too many for a flat list.
VectorView vector_at(const py::list& list, size_t i) {
  const py::tuple entry = list[i];
  return vector_of(entry[0].cast<Address>(), entry[1].cast<int>());
}

Output output_at(const py::list& list, size_t i) {
  const py::tuple entry = list[i];
  return output_of(entry[0].cast<Address>(), entry[1].cast<int>());
}

// parameters: w1 b1 w2 b2 w3 b3 norm_in weight, bias, norm_out weight, bias. outputs: dx, then their gradients.
cpu::LinkBackward backward_of(const cpu::LinkConfig& config, const py::list& parameters, const py::list& outputs) {
  if (parameters.size() != 10 || outputs.size() != 11) throw py::value_error("expected 10 parameters and 11 outputs");
  cpu::LinkBackward call{};
  call.config = config;
  const auto weight = [&](size_t i) {
    const VectorView view = vector_at(parameters, i);
    return cpu::Weight{view.data, view.dtype, cpu::Form::stored};
  };
  call.weights = {weight(0),
                  weight(2),
                  weight(4),
                  vector_at(parameters, 1),
                  vector_at(parameters, 3),
                  vector_at(parameters, 5),
                  vector_at(parameters, 6),
                  vector_at(parameters, 7),
                  vector_at(parameters, 8),
                  vector_at(parameters, 9)};
  call.dx = output_at(outputs, 0);
  call.dw1 = output_at(outputs, 1);
  call.db1 = output_at(outputs, 2);
  call.dw2 = output_at(outputs, 3);
  call.db2 = output_at(outputs, 4);
  call.dw3 = output_at(outputs, 5);
  call.db3 = output_at(outputs, 6);
  call.dnorm_in_weight = output_at(outputs, 7);
  call.dnorm_in_bias = output_at(outputs, 8);
  call.dnorm_out_weight = output_at(outputs, 9);
  call.dnorm_out_bias = output_at(outputs, 10);
  return call;
}

int64_t link_backward_workspace(int isa, int threads, int compute, int residual, int64_t tokens, int64_t in_features,
                                int64_t hidden_features, int64_t out_features, const py::list& parameters,
                                const py::list& outputs) {
  cpu::LinkBackward call = backward_of(
      config_of(isa, threads, compute, residual, 0, 0.0f, tokens, in_features, hidden_features, out_features),
      parameters, outputs);
  call.x.data = &call;
  return cpu::link_backward_workspace(call);
}

void link_backward(int isa, int threads, int compute, int residual, int gelu, float eps, int64_t tokens,
                   int64_t in_features, int64_t hidden_features, int64_t out_features, Address dy, int64_t dy_stride,
                   int dy_dtype, Address x, int64_t x_stride, int x_dtype, Address pre, int64_t pre_stride, Address z,
                   int64_t z_stride, Address stats, const py::list& parameters, const py::list& outputs,
                   Address workspace, int64_t workspace_bytes) {
  cpu::LinkBackward call = backward_of(
      config_of(isa, threads, compute, residual, gelu, eps, tokens, in_features, hidden_features, out_features),
      parameters, outputs);
  call.dy = matrix_of(dy, dy_stride, dy_dtype);
  call.x = matrix_of(x, x_stride, x_dtype);
  call.pre = matrix_of(pre, pre_stride, compute);
  call.z = matrix_of(z, z_stride, compute);
  call.stats = pointer<const float>(stats);
  run("link_backward", [&] { return cpu::link_backward(call, pointer<void>(workspace), workspace_bytes); });
}

void pack_weight(int isa, int threads, int compute, Address weight, int dtype, int64_t rows, int64_t columns,
                 Address packed) {
  run("pack_weight", [&] {
    return cpu::pack_weight(vector_of(weight, dtype), rows, columns, pointer<void>(packed), static_cast<Dtype>(compute),
                            static_cast<Isa>(isa), threads);
  });
}

void handoff_scatter(Address rows, int64_t rows_stride, Address slot_rows, int64_t count, int64_t row_bytes,
                     Address table, int64_t table_stride, int64_t table_rows) {
  run("handoff_scatter", [&] {
    return cpu::handoff_scatter(pointer<const void>(rows), rows_stride, pointer<const int64_t>(slot_rows), count,
                                row_bytes, pointer<void>(table), table_stride, table_rows);
  });
}

void handoff_take(Address table, int64_t table_stride, int64_t table_rows, Address slot_rows, int64_t count,
                  int64_t row_bytes, Address rows) {
  run("handoff_take", [&] {
    return cpu::handoff_take(pointer<void>(table), table_stride, table_rows, pointer<const int64_t>(slot_rows), count,
                             row_bytes, pointer<void>(rows));
  });
}

int64_t alignment_workspace(int isa, int threads, int64_t tokens, int64_t features) {
  cpu::Alignment call{};
  call.tokens = tokens;
  call.features = features;
  call.isa = static_cast<Isa>(isa);
  call.threads = threads;
  return cpu::alignment_workspace(call);
}

void alignment(int isa, int threads, int64_t tokens, int64_t features, int64_t table_rows, Address pred,
               int64_t pred_stride, int pred_dtype, Address target, int64_t target_stride, int target_dtype,
               Address token_ids, Address mask, float cosine_weight, float mse_weight, float embed_scale, Address loss,
               Address grad, Address workspace, int64_t workspace_bytes) {
  const cpu::Alignment call{tokens,
                            features,
                            table_rows,
                            matrix_of(pred, pred_stride, pred_dtype),
                            matrix_of(target, target_stride, target_dtype),
                            pointer<const int64_t>(token_ids),
                            pointer<const float>(mask),
                            cosine_weight,
                            mse_weight,
                            embed_scale,
                            pointer<float>(loss),
                            output_of(grad, pred_dtype),
                            static_cast<Isa>(isa),
                            threads};
  run("alignment", [&] { return cpu::alignment(call, pointer<void>(workspace), workspace_bytes); });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels; addresses and sizes in. Use recmas_kernels instead.";
  module.def("best_isa", [] { return static_cast<int>(cpu::best_isa()); });
  module.def("link_forward_workspace", &link_forward_workspace);
  module.def("link_forward", &link_forward);
  module.def("link_backward_workspace", &link_backward_workspace);
  module.def("link_backward", &link_backward);
  module.def("packed_bytes", [](int isa, int compute, int64_t rows, int64_t columns) {
    return cpu::packed_bytes(rows, columns, static_cast<Dtype>(compute), static_cast<Isa>(isa));
  });
  module.def("pack_weight", &pack_weight);
  module.def("sample_words", [](Address data, int64_t bytes, Address words) {
    cpu::sample_words(pointer<const void>(data), bytes, pointer<uint64_t>(words));
  });
  module.def("words_match", [](Address data, int64_t bytes, Address words) {
    return cpu::words_match(pointer<const void>(data), bytes, pointer<const uint64_t>(words));
  });
  module.def("handoff_scatter", &handoff_scatter);
  module.def("handoff_take", &handoff_take);
  module.def("alignment_workspace", &alignment_workspace);
  module.def("alignment", &alignment);
}
