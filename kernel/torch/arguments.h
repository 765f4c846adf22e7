// What the torch ops share: their arguments as one struct, the checks on tensors that the C API
// cannot make because it sees only pointers, and the translation to the C structs. No tensor is
// copied.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flashtile/flashtile.h"
#include "options.h"
#include "overlap.h"
#include "scores.h"
#include "sentences.h"

namespace flashtile::ops {

// Where packed sequences begin and end; without cu_seqlens the batch is dense. seqused counts in
// both. Tensors are positional in the schemas: torch registers neither gradients nor vmap rules for
// ops with keyword-only tensors.
struct Sequences {
  int64_t max_seqlen_q;         // varlen only
  int64_t max_seqlen_k;         // varlen only
  OptionalTensor cu_seqlens_q;  // [batch + 1], int32; both or neither
  OptionalTensor cu_seqlens_k;  // [batch + 1], int32
  OptionalTensor seqused_q;     // [batch], int32; unset: all rows
  OptionalTensor seqused_k;     // [batch], int32

  template <class Visit>
  void visit(const Visit& member) {
    member("SymInt max_seqlen_q=0", max_seqlen_q);
    member("SymInt max_seqlen_k=0", max_seqlen_k);
    member("Tensor? cu_seqlens_q=None", cu_seqlens_q);
    member("Tensor? cu_seqlens_k=None", cu_seqlens_k);
    member("Tensor? seqused_q=None", seqused_q);
    member("Tensor? seqused_k=None", seqused_k);
  }
};

// Dense: q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_kv, head_dim), v
// and out the same with head_dim_v. Varlen: q and out (total_q, ...), k and v (total_k, ...). k and
// v have the dtype of q or, under float32, 16 bits.
struct Arguments {
  Tensor q, k, v;
  OptionalTensor out = std::nullopt;  // forward: written; unset: a new tensor
  Options options = {};
  Sequences sequences = {};
  ScoreOptions scores = {};

  template <class Visit>
  void visit(const Visit& member) {
    options.visit(member);
    sequences.visit(member);
    scores.visit(member);
  }
  const Tensor& keys() const { return k; }
  const Tensor& values() const { return v; }
  bool is_varlen() const { return sequences.cu_seqlens_q.has_value(); }
  int64_t batch() const { return is_varlen() ? sequences.cu_seqlens_q->size(0) - 1 : q.size(0); }
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
  Tensor dout;                  // shaped like out
  Tensor out;                   // shaped like q, with head_dim_v
  Tensor softmax_lse;           // in lse_dtype(q), shaped as lse_sizes(q)
  OptionalTensor dsoftmax_lse;  // shaped like softmax_lse
  WantedGradients wanted = {};  // beside those of q, k, v
};

// (batch, num_heads, seqlen_q), packed (num_heads, total_q).
std::vector<int64_t> lse_sizes(const Tensor& q);
// Shaped like q, with the head_dim of v.
std::vector<int64_t> out_sizes(const Tensor& q, const Tensor& v);

// One sentence that names the argument, what it was and what is allowed; empty when all is well.
std::string refusal(const Arguments& args);
std::string refusal(const BackwardArguments& args);
// The same of an out that is given: it can be written while the others are read.
std::string out_refusal(const OptionalTensor& out, const NamedTensor& q, const NamedTensor& k,
                        const NamedTensor& v);

// `scores` is what the problem points to.
flashtile_problem to_problem(const Arguments& args, flashtile_scores& scores);
// The problem's device, dtypes and heads, for q and k of dtypes that passed the checks; k and v may
// be a cache.
flashtile_problem problem_like(const Tensor& q, const Tensor& k, const Tensor& v);
flashtile_tensor to_view(const Tensor& tensor, void* data);
inline flashtile_tensor read_view(const Tensor& tensor) {
  return to_view(tensor, const_cast<void*>(tensor.const_data_ptr()));
}
inline flashtile_tensor write_view(const Tensor& tensor) {
  return to_view(tensor, tensor.mutable_data_ptr());
}

}  // namespace flashtile::ops
