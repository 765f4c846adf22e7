// The forward, which attention over tensors and attention over a cache share: what is computed, and
// what is answered instead.
#pragma once

#include <tuple>

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
};

inline int64_t lse_stride_batch(const Tensor& lse) { return lse.dim() == 3 ? lse.stride(0) : 0; }
inline int64_t lse_stride_head(const Tensor& lse) { return lse.stride(lse.dim() - 2); }

// Returns out and softmax_lse.
std::tuple<Tensor, Tensor> run(const ForwardCall& call, CUstream_st* stream);

// Whether the call would run. No data is read.
Answer answer(const ForwardCall& call);

// Stands in for a tensor that does not exist yet: contiguous, at an address where no tensor lies;
// `number` tells such tensors apart.
inline flashtile_tensor contiguous_view(const IntHeaderOnlyArrayRef& sizes, uintptr_t number) {
  flashtile_tensor view = {};
  // NOLINTNEXTLINE(performance-no-int-to-ptr): an address that is never read
  view.data = reinterpret_cast<void*>((number + 1) << 59);
  const size_t seq_dim = sizes.size() - 3;
  view.stride_head = sizes[seq_dim + 2];
  view.stride_seq = view.stride_head * sizes[seq_dim + 1];
  view.stride_batch = view.stride_seq * sizes[seq_dim];
  return view;
}

}  // namespace flashtile::ops
