// The two launches of decoding.
#pragma once

#include "cuda/slices.cuh"
#include "decode/combine.cuh"
#include "decode/sm80.cuh"

namespace flashtile {

template <int kHeadDim, Memory kMemory, class T>
Status launch_decode_kernels(const ForwardParams& params, CUstream_st* stream) {
  const Problem& problem = params.problem;
  const DecodeParams kernel_params{
      .forward = params,
      .q = query_format(params.q, problem, problem.head_dim),
      .k = key_format(params.k, problem, problem.head_dim),
      .v = key_format(params.v, problem, problem.head_dim_v),
      .out = query_format(params.out, problem, problem.head_dim_v),
      .page_size = Divisor(static_cast<uint32_t>(problem.cache.page_size)),
      .plan = decode_plan(problem),
      .scale_log2 = positive_scale_log2(problem.softmax_scale),
      .negate_q = problem.softmax_scale < 0.0f};
  if (Status s = launch<DecodeSm80<kHeadDim, kMemory, T>>(
          kernel_params, kernel_params.plan.blocks(problem), stream)) {
    return s;
  }
  return launch<DecodeCombine<kHeadDim, kMemory, T>>(kernel_params, combine_blocks(problem),
                                                     stream);
}

template <Family kFamily, int kHeadDim>
Status launch_slice(Slice<Pass::kDecode, kFamily, kHeadDim>, const ForwardParams& params,
                    const cuda::Device&, CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    return launch_decode_kernels<kHeadDim, memory_of(kFamily), T>(params, stream);
  });
}

template <Family kFamily, int kHeadDim>
size_t slice_workspace(Slice<Pass::kDecode, kFamily, kHeadDim>, const Problem& problem) {
  return DecodeWorkspace::bytes(decode_plan(problem).partials(problem), kHeadDim);
}

}  // namespace flashtile
