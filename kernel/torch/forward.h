// The forward, which attention over tensors and attention over a cache share: what is computed, and
// what is answered instead. Both take the op's own struct, Arguments or ReadArguments, which has
// passed its checks: q with 4 dimensions, packed 3; keys() and values(), tensors of the batch or
// the pages of a cache; out; names().
#pragma once

#include "arguments.h"
#include "call.h"
#include "flashtile/flashtile.h"

namespace flashtile::ops {

struct ForwardResult {
  Tensor out, softmax_lse;
  OptionalTensor max_logit;  // (num_heads), in lse_dtype(q); where it is wanted
};

inline int64_t lse_stride_batch(const Tensor& lse) { return lse.dim() == 3 ? lse.stride(0) : 0; }
inline int64_t lse_stride_head(const Tensor& lse) { return lse.stride(lse.dim() - 2); }

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

// As the C API takes it; a new out is a stand-in.
template <class Args>
flashtile_forward_params to_params(const Args& args, const flashtile_problem& problem,
                                   bool wants_max_logit) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.q = read_view(args.q);
  params.k = read_view(args.keys());
  params.v = read_view(args.values());
  params.out = args.out.has_value() ? write_view(*args.out)
                                    : contiguous_view(out_sizes(args.q, args.values()), 0);
  if (wants_max_logit) params.max_logit = static_cast<float*>(stand_in_memory(1));
  return params;
}

template <class Args>
ForwardResult run(const Args& args, const flashtile_problem& problem, bool wants_max_logit,
                  CUstream_st* stream) {
  const Tensor& q = args.q;
  OptionalTensor out = args.out, lse, max_logit;
  const auto allocate = [&](Call<ForwardParams>& core) {
    const ScalarType dtype = lse_dtype(q.scalar_type());
    if (!out.has_value()) {
      out = torch::stable::new_empty(q, out_sizes(q, args.values()));
      core.params.out = to_core(write_view(*out));
    }
    lse = torch::stable::new_empty(q, lse_sizes(q), dtype);
    core.params.lse = {static_cast<float*>(lse->mutable_data_ptr()), lse_stride_batch(*lse),
                       lse_stride_head(*lse)};
    if (!wants_max_logit) return;
    max_logit = torch::stable::new_empty(q, {q.size(q.dim() - 2)}, dtype);
    core.scores.max_logit.data = max_logit->mutable_data_ptr();
  };
  run_call<ForwardParams>(to_params(args, problem, wants_max_logit), q, stream, args.names(),
                          allocate);
  return {*out, *lse, max_logit};
}

// Whether it would run. No data is read.
template <class Args>
Answer answer(const Args& args, const flashtile_problem& problem, bool wants_max_logit) {
  return ask_call<ForwardParams>(to_params(args, problem, wants_max_logit), args.names());
}

}  // namespace flashtile::ops
