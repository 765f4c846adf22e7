// The forward, which attention over tensors and attention over a cache share: what is computed, and
// what is answered instead.
#pragma once

#include "call.h"
#include "flashtile/flashtile.h"
#include "sentences.h"

namespace flashtile::ops {

// A call that has passed the checks of its op. q has 4 dimensions, packed 3; k and v are tensors of
// the batch or the pages of a cache, as the problem says. Nothing is copied: all must outlive it.
struct ForwardCall {
  const Tensor &q, &k, &v;
  const OptionalTensor& out;  // written; unset: a new tensor
  const flashtile_problem& problem;
  OpNames names;
  bool wants_max_logit = false;
};
struct ForwardResult {
  Tensor out, softmax_lse;
  OptionalTensor max_logit;  // (num_heads), in lse_dtype(q); where it is wanted
};

inline int64_t lse_stride_batch(const Tensor& lse) { return lse.dim() == 3 ? lse.stride(0) : 0; }
inline int64_t lse_stride_head(const Tensor& lse) { return lse.stride(lse.dim() - 2); }

ForwardResult run(const ForwardCall& call, CUstream_st* stream);

// Whether the call would run. No data is read.
Answer answer(const ForwardCall& call);

// Stands in for the memory of a tensor that does not exist yet: an address where no tensor lies;
// `number` tells such tensors apart, 0 to 12.
inline void* stand_in_memory(uintptr_t number) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): an address that is never read
  return reinterpret_cast<void*>((number + 1) << 59);
}

// Stands in for such a tensor, which will be contiguous.
inline flashtile_tensor contiguous_view(const IntHeaderOnlyArrayRef& sizes, uintptr_t number) {
  flashtile_tensor view = {};
  view.data = stand_in_memory(number);
  const size_t seq_dim = sizes.size() - 3;
  view.stride_head = sizes[seq_dim + 2];
  view.stride_seq = view.stride_head * sizes[seq_dim + 1];
  view.stride_batch = view.stride_seq * sizes[seq_dim];
  return view;
}

}  // namespace flashtile::ops
