// The backward over mma.sync: three launches on one stream.
#pragma once

#include "backward/score_gradients.cuh"
#include "backward/sm80.cuh"
#include "backward/workspace.cuh"
#include "cuda/slices.cuh"

namespace flashtile {

template <int kHeadDim, Memory kMemory, Variant kVariant>
BackwardWorkspace backward_workspace(const Problem& problem) {
  constexpr BackwardConfig kConfig = backward_config(kHeadDim, kMemory, kVariant);
  return backward_workspace<kConfig.block_q, kConfig.block_k, kHeadDim, 1>(problem);
}

template <Family kFamily, int kHeadDim, Variant kVariant>
size_t slice_workspace(Slice<Pass::kBackward, kFamily, kHeadDim, kVariant>,
                       const Problem& problem) {
  return backward_workspace<kHeadDim, memory_of(kFamily), kVariant>(problem).bytes;
}

template <class T, int kHeadDim, Memory kMemory, class Policy, class LaunchParams>
Status launch_backward(const LaunchParams& launch_params, CUstream_st* stream) {
  const Problem& p = launch_params.params.problem;
  const int64_t query_blocks = launch_params.slots_q * p.num_heads;
  const int64_t key_blocks = launch_params.slots_k * p.num_heads_kv;
  using Order = DqOrder<kHeadDim, kMemory, Policy::kVariant>;
  if (Status s = launch<BackwardDelta<T, kHeadDim, Order, 1, Policy>>(launch_params, query_blocks,
                                                                      stream)) {
    return s;
  }
  // Without queries there is no dQ to take turns at, and the turns have not been set to 0.
  const bool ordered = p.deterministic && query_blocks > 0;
  if (Status s = ordered ? launch<BackwardSm80<T, kHeadDim, kMemory, true, Policy>>(
                               launch_params, key_blocks, stream)
                         : launch<BackwardSm80<T, kHeadDim, kMemory, false, Policy>>(
                               launch_params, key_blocks, stream)) {
    return s;
  }
  return launch<BackwardDq<T, kHeadDim, Order, Policy>>(launch_params, query_blocks, stream);
}

template <Family kFamily, int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kBackward, kFamily, kHeadDim, kVariant>,
                    const BackwardParams& params, const Scores& scores, const cuda::Device&,
                    CUstream_st* stream) {
  constexpr Memory kMemory = memory_of(kFamily);
  using Shape = BackwardShape<kHeadDim, kMemory, kVariant>;
  const Problem& p = params.problem;
  BackwardLaunch launch_params =
      backward_launch(params, backward_workspace<kHeadDim, kMemory, kVariant>(p));
  launch_params.rows_fill_tiles =
      fills_tile(launch_params.q, kHeadDim) && fills_tile(launch_params.k, kHeadDim) &&
      fills_tile(launch_params.v, kHeadDim) && fills_tile(launch_params.dout, kHeadDim);
  launch_params.q_pass_bytes = 2 * Shape::QueryCopy::kRowsPerPass * params.q.stride_seq;
  launch_params.dout_pass_bytes = 2 * Shape::QueryCopy::kRowsPerPass * params.dout.stride_seq;
  return with_dtype(p, [&]<class T>(T) {
    using Policy = ScorePolicyOf<kVariant>;
    if constexpr (Policy::kModifies) {
      const auto scored = with_scores<Policy>(launch_params, scores);
      if (Status s = launch_backward<T, kHeadDim, kMemory, Policy>(scored, stream)) return s;
      return launch_score_gradients<T, kHeadDim, DqOrder<kHeadDim, kMemory, kVariant>>(scored,
                                                                                       stream);
    } else {
      return launch_backward<T, kHeadDim, kMemory, Policy>(launch_params, stream);
    }
  });
}

}  // namespace flashtile
