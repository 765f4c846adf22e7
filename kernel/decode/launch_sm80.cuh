// The two launches of decoding.
#pragma once

#include "cuda/slices.cuh"
#include "decode/combine.cuh"
#include "decode/sm80.cuh"

namespace flashtile {

template <class Kernel, class Combine>
Status launch_decode_kernels(const ForwardParams& params, const Scores& scores,
                             CUstream_st* stream) {
  const Problem& problem = params.problem;
  const DecodeParams base{.forward = params,
                          .q = query_format(params.q, problem, problem.head_dim),
                          .k = key_format(params.k, problem, problem.head_dim),
                          .v = key_format(params.v, problem, problem.head_dim_v),
                          .out = query_format(params.out, problem, problem.head_dim_v),
                          .page_size = Divisor(static_cast<uint32_t>(problem.cache.page_size)),
                          .plan = decode_plan(problem),
                          .scale_log2 = positive_scale_log2(problem.softmax_scale),
                          .negate_q = problem.softmax_scale < 0.0f};
  if constexpr (Kernel::ScorePolicy::kModifies) {
    // Where the forward's loop has gone before, it has cleared it.
    if (!decode_forms(problem).prefill) {
      if (Status s = clear_max_logit<Kernel>(problem, scores, stream)) return s;
    }
  }
  const auto kernel_params = with_scores<Kernel>(base, problem, scores);
  if (Status s = launch<Kernel>(kernel_params, base.plan.blocks(problem), stream)) return s;
  return launch<Combine>(kernel_params, combine_blocks(problem), stream);
}

template <Family kFamily, int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kDecode, kFamily, kHeadDim, kVariant>, const ForwardParams& params,
                    const Scores& scores, const cuda::Device&, CUstream_st* stream) {
  constexpr Memory kMemory = memory_of(kFamily);
  using Policy = ScorePolicyOf<kVariant>;
  return with_dtype(params.problem, [&]<class T>(T) {
    return launch_decode_kernels<DecodeSm80<kHeadDim, kMemory, T, Policy>,
                                 DecodeCombine<kHeadDim, kMemory, T, Policy>>(params, scores,
                                                                              stream);
  });
}

template <Family kFamily, int kHeadDim, Variant kVariant>
size_t slice_workspace(Slice<Pass::kDecode, kFamily, kHeadDim, kVariant>, const Problem& problem) {
  return DecodeWorkspace::bytes(decode_plan(problem).partials(problem), kHeadDim);
}

}  // namespace flashtile
