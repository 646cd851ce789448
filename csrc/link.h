// The whole native surface: sizes, element types, plain pointers, a status code.
//
// Nothing here knows torch or Python, allocates memory, reads the environment or picks a stream. Matrices are
// row-major with a stride in elements between rows; vectors are contiguous. The mathematics, for a row x:
//
//     u = norm_in(x)    p = u W1^T + b1    a = gelu(p)    z = r(x) + a W2^T + b2    y = norm_out(z)
//     r(x) = x (identity) | x W3^T + b3 (linear) | 0 (none), always of the raw x
//
// Every sum is accumulated in fp32. Same arguments and same thread count give the same bits.
#pragma once

#include <cstdint>

namespace recmas {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
enum class Residual : int32_t { none = 0, identity = 1, linear = 2 };
enum class Gelu : int32_t { erf = 0, tanh = 1 };

enum class Status : int32_t {
  ok = 0,
  bad_argument = 1,         // a size is negative, a required pointer is null, or a dtype pair is not served
  isa_unavailable = 2,      // the requested instruction set is not built or this processor lacks it
  workspace_too_small = 3,  // fewer bytes than the matching *_workspace function asks for
  row_out_of_range = 4,     // a slot row or token id points outside its table
  device_error = 5,         // the accelerator's runtime reported an error
};

struct LinkShape {
  int64_t tokens, in_features, hidden_features, out_features;  // all > 0
};

struct MatrixView {  // absent if data is null
  const void* data;
  int64_t stride;
  Dtype dtype;
};

struct VectorView {  // absent if data is null
  const void* data;
  Dtype dtype;
};

struct Output {  // contiguous; not wanted if data is null
  void* data;
  Dtype dtype;
};

// BLAS's sgemm, called as Fortran does, of columns; from several threads at once. Sizes have 64 bits, of which a
// library with 32 reads the lower half.
using Sgemm = void(const char* turn_left, const char* turn_right, const int64_t* rows, const int64_t* columns,
                   const int64_t* k, const float* factor, const float* left, const int64_t* left_stride,
                   const float* right, const int64_t* right_stride, const float* keep, float* result,
                   const int64_t* result_stride);

// The instruction sets with kernels of their own, in rising order; a processor that has one has all below it.
enum class Isa : int32_t { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

namespace cpu {

// Panels and stored weights are summed in different orders; asking for panel order makes the bits of a call with a
// stored weight those of the same call after packing.
enum class Form : int32_t {
  stored = 0,              // [rows, columns] as nn.Linear stores it
  stored_panel_order = 1,  // the same, with the sums of packed
  packed = 2,              // panels in the compute dtype, from pack_weight
};

struct Weight {  // absent if data is null
  const void* data;
  Dtype dtype;
  Form form;
  const void* packed_from = nullptr;  // packed, of fp32: the weight itself, which a library's product reads; or null
};

struct LinkWeights {
  Weight w1;  // [hidden, in]
  Weight w2;  // [out, hidden]
  Weight w3;  // [out, in], with Residual::linear only
  VectorView b1, b2, b3;
  VectorView norm_in_weight, norm_in_bias;    // absent weight: no input norm
  VectorView norm_out_weight, norm_out_bias;  // absent weight: no output norm
};

struct LinkConfig {
  LinkShape shape;
  Residual residual;
  Gelu gelu;
  float eps;      // both norms
  Dtype compute;  // inputs and weights are rounded to it
  Isa isa;
  int32_t threads;  // >= 1
  Sgemm* sgemm;     // for large products in fp32, with instruction sets that multiply those slower; or null
};

struct LinkForward {
  LinkConfig config;
  LinkWeights weights;
  MatrixView x;  // [tokens, in]
  Output y;      // [tokens, out]
  Output pre;    // [tokens, hidden] p, compute dtype; training only
  Output z;      // [tokens, out] z, compute dtype; training with an output norm only
  float* stats;  // [4, tokens] mean_in, rstd_in, mean_out, rstd_out; rows of absent norms stay unwritten; or null
};

struct LinkBackward {
  LinkConfig config;
  LinkWeights weights;  // unpacked
  MatrixView dy;        // [tokens, out]
  MatrixView x;         // [tokens, in]
  MatrixView pre;       // [tokens, hidden]
  MatrixView z;         // [tokens, out], with an output norm only
  const float* stats;   // [4, tokens]
  Output dx;            // [tokens, in]
  Output dw1, db1, dw2, db2, dw3, db3;
  Output dnorm_in_weight, dnorm_in_bias, dnorm_out_weight, dnorm_out_bias;
};

// A product of a frozen weight: y = x W^T + b.
struct FrozenForward {
  int64_t tokens, in_features, out_features;
  MatrixView x;        // [tokens, in_features], fp32 or of the stored dtype
  const void* weight;  // [out_features, in_features] as panels, from pack_weight in the stored dtype; or as it lies
  VectorView bias;     // [out_features]
  Output y;            // [tokens, out_features]
  Dtype stored;        // bf16 panels are of finite values: parts of fp32 rows may be 0 (cpu/split.h)
  Form form;           // packed; or stored, which takes up to 16 tokens
  Isa isa;
  int32_t threads;
};

// Its input gradient dx = dy W, from the same panels.
struct FrozenBackward {
  int64_t tokens, in_features, out_features;
  MatrixView dy;  // [tokens, out_features], fp32 or of the stored dtype
  const void* panels;
  Output dx;     // [tokens, in_features]
  Dtype stored;  // as for FrozenForward
  Isa isa;
  int32_t threads;
};

// A frozen weight [out, in] as panels of the stored dtype, and its bias.
struct FrozenWeight {
  const void* panels;
  Dtype stored;  // as for FrozenForward
  VectorView bias;
};

// x / sqrt(mean(x^2) + eps) * (offset + gain); no norm if the gain is absent.
struct RmsGain {
  VectorView gain;
  float offset, eps;
};

constexpr int64_t most_layer_rows = 16;  // of the two parts of a decoder layer

struct HeadRows {  // [rows, key_heads, head_features], the last dense; strides in elements
  void* data;
  int64_t row_stride, head_stride;
  Dtype dtype;
};

// One position of a decoder layer, up to its attention, for few rows: u = norm(x), and heads of u Wq^T + bq, u Wk^T +
// bk and u Wv^T + bv. Queries and keys are normed by head where there are such norms, then turned:
//
//     turn(h) = h cos + (-h[half:], h[:half]) sin
struct LayerInputs {
  int64_t rows, features;
  int64_t heads, key_heads, head_features;  // heads is a multiple of key_heads, head_features even
  MatrixView x;                             // [rows, features], fp32 or of the stored dtype of all weights
  RmsGain norm, query_norm, key_norm;       // gains [features], [head_features] twice
  FrozenWeight query, key, value;           // out features: heads, key_heads and key_heads times head_features
  MatrixView cos, sin;                      // [rows, head_features]; stride 0 for one row that serves all
  float scale;                              // of queries, for the scores
  float* queries;                           // [rows, heads, head_features], scaled
  HeadRows keys, values;
  Isa isa;
  int32_t threads;
};

struct CacheView {  // [rows, key_heads, positions, head_features], the last dense; strides in elements
  const void* data;
  int64_t row_stride, head_stride, position_stride;
  Dtype dtype;
};

enum class Activation : int32_t { silu = 0, gelu_erf = 1, gelu_tanh = 2 };

// The rest of that layer: attention over the cache, whose last position is this one, then the gated feed-forward part.
//
//     h = x + norm_1(attention Wo^T + bo)    y = h + norm_3(d),   d = (act(u Wg^T + bg) * (u Wu^T + bu)) Wd^T + bd,
//     u = norm_2(h)
struct LayerOutput {
  int64_t rows, features, hidden_features;
  int64_t heads, key_heads, head_features, positions;
  MatrixView x;          // as for LayerInputs
  const float* queries;  // from LayerInputs
  CacheView keys, values;
  const uint8_t* mask;      // 0: not attended; null: all are. A row that attends to nothing gets zeros
  int64_t mask_stride;      // between rows
  FrozenWeight out;         // [features, heads * head_features]
  RmsGain after_attention;  // norm_1, may be absent
  RmsGain before_feed;      // norm_2
  FrozenWeight gate, up;    // [hidden, features]
  Activation activation;
  FrozenWeight down;   // [features, hidden]
  RmsGain after_feed;  // norm_3, may be absent
  Output y;            // [rows, features], of x's dtype; may be x
  Isa isa;
  int32_t threads;
};

// A whole layer: keys and values of `inputs` are the last position of those of `output`, and both have one x.
struct DecoderLayer {
  LayerInputs inputs;
  LayerOutput output;
};

// y = x / sqrt(mean(x^2) + eps) * (offset + gain), row by row.
struct RmsNorm {
  int64_t rows, columns;
  MatrixView x;     // [rows, columns]
  VectorView gain;  // [columns]
  float offset, eps;
  Output y;  // [rows, columns], of x's dtype
  Isa isa;
  int32_t threads;
};

struct Alignment {
  int64_t tokens, features, table_rows;
  MatrixView pred;           // [tokens, features]
  MatrixView target;         // [tokens, features], or the table [table_rows, features] when token_ids is given
  const int64_t* token_ids;  // [tokens] or null
  const float* mask;         // [tokens] or null (all ones)
  float cosine_weight, mse_weight, embed_scale;
  float* loss;  // [1]
  Output grad;  // [tokens, features]
  Isa isa;
  int32_t threads;
};

Isa best_isa();  // by cpuid, and what was built

// Weight packing: `weight` is [rows, columns] contiguous; the result is rounded to `compute`.
int64_t packed_bytes(int64_t rows, int64_t columns, Dtype compute, Isa isa);
Status pack_weight(VectorView weight, int64_t rows, int64_t columns, void* packed, Dtype compute, Isa isa,
                   int32_t threads);

// And back: `weight` [rows, columns] contiguous, of `compute`; the bits that were packed if they were of `compute`.
Status unpack_weight(const void* packed, int64_t rows, int64_t columns, void* weight, Dtype compute, Isa isa,
                     int32_t threads);

int64_t link_forward_workspace(const LinkForward& call);  // bytes, 64-byte aligned by the caller
Status link_forward(const LinkForward& call, void* workspace, int64_t workspace_bytes);
int64_t link_backward_workspace(const LinkBackward& call);
Status link_backward(const LinkBackward& call, void* workspace, int64_t workspace_bytes);

int64_t frozen_forward_workspace(const FrozenForward& call);
Status frozen_forward(const FrozenForward& call, void* workspace, int64_t workspace_bytes);
int64_t frozen_backward_workspace(const FrozenBackward& call);
Status frozen_backward(const FrozenBackward& call, void* workspace, int64_t workspace_bytes);
Status rms_norm(const RmsNorm& call);
int64_t layer_inputs_workspace(const LayerInputs& call);
Status layer_inputs(const LayerInputs& call, void* workspace, int64_t workspace_bytes);
int64_t layer_output_workspace(const LayerOutput& call);
Status layer_output(const LayerOutput& call, void* workspace, int64_t workspace_bytes);

// Layers after each other by one team of threads. Each reads what the one before it wrote; all may have the same
// queries.
int64_t decoder_layers_workspace(const DecoderLayer* layers, int64_t count);
Status decoder_layers(const DecoderLayer* layers, int64_t count, void* workspace, int64_t workspace_bytes);

// The latent handoff: table[slot_rows[i]] = rows[i], for whole rows of any element type. Strides are in bytes.
Status handoff_scatter(const void* rows, int64_t rows_stride, const int64_t* slot_rows, int64_t count,
                       int64_t row_bytes, void* table, int64_t table_stride, int64_t table_rows);
// Its gradient: rows[i] = table[slot_rows[i]], and those rows of the table become 0. rows is [count, row_bytes].
Status handoff_take(void* table, int64_t table_stride, int64_t table_rows, const int64_t* slot_rows, int64_t count,
                    int64_t row_bytes, void* rows);

// loss = sum_t mask_t (cw (1 - cos(p_t, s e_t)) + mw mean_d (p_t - s e_t)^2) / sum_t mask_t, and its gradient in p.
int64_t alignment_workspace(const Alignment& call);
Status alignment(const Alignment& call, void* workspace, int64_t workspace_bytes);

}  // namespace cpu

// Device pointers. Work goes to `stream`, a cudaStream_t of the current device; nothing waits for it and nothing is
// allocated, so every call can be captured in a graph. Returns the CUDA runtime's own error code, 0 for success.
namespace cuda {

constexpr int32_t most_link_tokens = 32;

struct LinkForward {  // up to most_link_tokens; rows of weights are whole pieces of 16 bytes at aligned addresses
  LinkShape shape;
  Residual residual;
  Gelu gelu;
  float eps;      // both norms
  Dtype compute;  // of the weight matrices, contiguous as nn.Linear stores them; x is rounded to it
  const void* w1;
  const void* w2;
  const void* w3;  // with Residual::linear only
  VectorView b1, b2, b3;
  VectorView norm_in_weight, norm_in_bias;    // fp32 or the compute dtype, both; absent weight: no input norm
  VectorView norm_out_weight, norm_out_bias;  // fp32 or y's dtype, both; absent weight: no output norm
  MatrixView x;                               // [tokens, in] fp32 or the compute dtype
  Output y;                                   // [tokens, out] x's dtype
  Output pre;                                 // [tokens, hidden] p, compute dtype; training only
  Output z;                                   // [tokens, out] z, compute dtype; training with an output norm only
  float* stats;  // [4, tokens] mean_in, rstd_in, mean_out, rstd_out; rows of absent norms stay unwritten; or null
};

int64_t link_forward_workspace(const LinkForward& call);  // bytes, 16-byte aligned by the caller
int32_t link_forward(const LinkForward& call, void* workspace, int64_t workspace_bytes, uintptr_t stream);

// When a link's next launch may start: after the one ahead has ended, when that has read its weights, or at once.
enum class Overlap : int32_t { off = 0, late = 1, early = 2 };
constexpr Overlap usual_overlap = Overlap::early;
constexpr int32_t usual_carveout = 100;
// For benchmarks, which compare them: how later calls of this process are launched. carveout: percent of a processor's
// unified memory that is asked for as shared memory.
void set_launches(Overlap overlap, int32_t carveout);

}  // namespace cuda

}  // namespace recmas
