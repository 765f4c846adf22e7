// The backward on sm_90a: three launches on one stream.
#pragma once

#include "backward/sm90.cuh"
#include "backward/workspace.cuh"
#include "cuda/slices.cuh"

namespace flashtile {

template <int kHeadDim>
BackwardWorkspace backward_workspace_sm90(const Problem& problem) {
  using Shape = BackwardShapeSm90<kHeadDim>;
  return backward_workspace<Shape::kBlockQ, Shape::kBlockK, kHeadDim, Shape::kWarpgroups>(problem);
}

template <int kHeadDim>
size_t slice_workspace(Slice<Pass::kBackward, Family::kSm90, kHeadDim>, const Problem& problem) {
  return backward_workspace_sm90<kHeadDim>(problem).bytes;
}

template <int kHeadDim>
Status encode_backward_maps(const BackwardParams& params, BackwardLaunchSm90& launch_params) {
  using Shape = BackwardShapeSm90<kHeadDim>;
  const Problem& p = params.problem;
  return encode_tensor_maps(
      {{query_tensor("q", params.q, p, p.head_dim), Shape::kBlockQ, launch_params.q},
       {key_tensor("k", params.k, p, p.head_dim), Shape::kBlockK, launch_params.k},
       {key_tensor("v", params.v, p, p.head_dim_v), Shape::kBlockK, launch_params.v},
       {query_tensor("dout", params.dout, p, p.head_dim_v), Shape::kBlockQ, launch_params.dout}});
}

template <int kHeadDim, class T, bool kDeterministic>
Status launch_backward(const BackwardParams& params, CUstream_st* stream) {
  using Shape = BackwardShapeSm90<kHeadDim>;
  using Order = DqOrderSm90<kHeadDim>;
  using Delta = BackwardDelta<T, kHeadDim, Order, Shape::kWarpgroups>;
  using Kernel = BackwardSm90<T, kHeadDim, kDeterministic>;
  const Problem& p = params.problem;
  BackwardLaunchSm90 launch_params;
  BackwardLaunch& base = launch_params.base;
  base = backward_launch(params, backward_workspace_sm90<kHeadDim>(p));
  if (base.slots_q == 0) return FLASHTILE_OK;  // no batch: no map, nothing to do
  if (Status s = prepare<Kernel>()) return s;
  if (Status s = encode_backward_maps<kHeadDim>(params, launch_params)) return s;
  const int64_t query_blocks = base.slots_q * p.num_heads;
  const int64_t key_blocks = base.slots_k * p.num_heads_kv;
  if (Status s = launch<Delta>(base, query_blocks, stream)) return s;
  if (Status s = launch_prepared<Kernel>(launch_params, key_blocks, stream)) return s;
  return launch<BackwardDq<T, kHeadDim, Order>>(base, query_blocks, stream);
}

template <int kHeadDim>
Status launch_slice(Slice<Pass::kBackward, Family::kSm90, kHeadDim>, const BackwardParams& params,
                    const Scores&, const cuda::Device&, CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    return params.problem.deterministic ? launch_backward<kHeadDim, T, true>(params, stream)
                                        : launch_backward<kHeadDim, T, false>(params, stream);
  });
}

}  // namespace flashtile
