// What the torch ops share: their arguments as one struct, the checks on tensors that the C API
// cannot make because it sees only pointers, and the translation to the C structs. No tensor is
// copied.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "flashtile/flashtile.h"
#include "sentences.h"

namespace flashtile::ops {

// Dense: q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_kv, head_dim), v
// and out the same with head_dim_v. Varlen: q and out (total_q, ...), k and v (total_k, ...). From
// softmax_scale to seqused_k the members are the options of the op schemas, in their order.
struct Arguments {
  Tensor q, k, v;
  std::optional<double> softmax_scale = std::nullopt;  // unset: 1 / sqrt(head_dim)
  int64_t window_left = FLASHTILE_UNLIMITED;
  int64_t window_right = FLASHTILE_UNLIMITED;
  bool deterministic = false;
  int64_t alignment = FLASHTILE_BOTTOM_RIGHT;
  int64_t max_seqlen_q = 0;                           // varlen only
  int64_t max_seqlen_k = 0;                           // varlen only
  std::optional<Tensor> cu_seqlens_q = std::nullopt;  // [batch + 1], int32; both set: varlen
  std::optional<Tensor> cu_seqlens_k = std::nullopt;  // [batch + 1], int32
  std::optional<Tensor> seqused_q = std::nullopt;     // [batch], int32; unset: all rows
  std::optional<Tensor> seqused_k = std::nullopt;     // [batch], int32
  std::optional<Tensor> out = std::nullopt;           // forward: written; unset: a new tensor

  bool is_varlen() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return is_varlen() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  int64_t head_dim_v() const { return v.size(v.dim() - 1); }
  // Lengths are arguments of varlen alone; in dense they are sizes.
  OpNames names() const {
    static constexpr std::pair<std::string_view, std::string_view> kVarlen[] = {
        {"seqlen_q", "max_seqlen_q"}, {"seqlen_k", "max_seqlen_k"}};
    return is_varlen() ? OpNames(kVarlen) : OpNames();
  }
};

struct BackwardArguments {
  Arguments forward;
  Tensor dout;                                        // shaped like out
  Tensor out;                                         // shaped like q, with head_dim_v
  Tensor softmax_lse;                                 // in lse_dtype(q), see lse_sizes
  std::optional<Tensor> dsoftmax_lse = std::nullopt;  // shaped like softmax_lse
};

// One sentence that names the argument, what it was and what is allowed; empty when all is well.
std::string refusal(const Arguments& args);
std::string refusal(const BackwardArguments& args);

flashtile_problem to_problem(const Arguments& args);
// Scale (unset: 1 / sqrt(head_dim)) and dtypes, for q of a dtype that q_refusal() lets pass.
void set_numbers(torch::headeronly::ScalarType q, std::optional<double> softmax_scale,
                 flashtile_problem& problem);
flashtile_tensor to_view(const Tensor& tensor, void* data);
inline flashtile_tensor read_view(const Tensor& tensor) {
  return to_view(tensor, const_cast<void*>(tensor.const_data_ptr()));
}
inline flashtile_tensor write_view(const Tensor& tensor) {
  return to_view(tensor, tensor.mutable_data_ptr());
}

// Stands in for a tensor that does not exist yet: contiguous, at an address where no tensor lies;
// `number` tells such tensors apart.
inline flashtile_tensor contiguous_view(const IntHeaderOnlyArrayRef& sizes, uintptr_t number) {
  flashtile_tensor view = {};
  // NOLINTNEXTLINE(performance-no-int-to-ptr): nobody reads there
  view.data = reinterpret_cast<void*>((number + 1) << 59);
  const size_t seq_dim = sizes.size() - 3;
  view.stride_head = sizes[seq_dim + 2];
  view.stride_seq = view.stride_head * sizes[seq_dim + 1];
  view.stride_batch = view.stride_seq * sizes[seq_dim];
  return view;
}

// Whether a call would run, the kernel's name or "", and why: why not, or why that kernel is not
// the one that the device has for such problems.
using Answer = std::tuple<bool, std::string, std::string>;

}  // namespace flashtile::ops
