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

template <int kHeadDim, Memory kMemory>
Status launch_decode_sm80(const ForwardParams& params, CUstream_st* stream) {
  return params.problem.dtype == Dtype::kBFloat16
             ? launch_decode_kernels<kHeadDim, kMemory, __nv_bfloat16>(params, stream)
             : launch_decode_kernels<kHeadDim, kMemory, __half>(params, stream);
}

template <int kHeadDim, Memory kMemory>
size_t decode_workspace_sm80(const Problem& problem) {
  return DecodeWorkspace::bytes(decode_plan(problem).partials(problem), kHeadDim);
}

}  // namespace flashtile
