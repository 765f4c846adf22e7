// The backward on sm_90a: three launches on one stream.
#pragma once

#include "backward/score_gradients.cuh"
#include "backward/sm90.cuh"
#include "backward/workspace.cuh"
#include "cuda/slices.cuh"

namespace flashtile {

template <int kHeadDim, Variant kVariant>
BackwardWorkspace backward_workspace_sm90(const Problem& problem) {
  using Shape = BackwardShapeSm90<kHeadDim, kVariant>;
  return backward_workspace<Shape::kBlockQ, Shape::kBlockK, kHeadDim, Shape::kWarpgroups>(problem);
}

template <int kHeadDim, Variant kVariant>
size_t slice_workspace(Slice<Pass::kBackward, Family::kSm90, kHeadDim, kVariant>,
                       const Problem& problem) {
  return backward_workspace_sm90<kHeadDim, kVariant>(problem).bytes;
}

template <class Shape>
Status encode_backward_maps(const BackwardParams& params,
                            BackwardLaunchSm90<typename Shape::Policy>& launch_params) {
  const Problem& p = params.problem;
  return encode_tensor_maps(
      {{query_tensor("q", params.q, p, p.head_dim), Shape::kBlockQ, launch_params.q},
       {key_tensor("k", params.k, p, p.head_dim), Shape::kBlockK, launch_params.k},
       {key_tensor("v", params.v, p, p.head_dim_v), Shape::kBlockK, launch_params.v},
       {query_tensor("dout", params.dout, p, p.head_dim_v), Shape::kBlockQ, launch_params.dout}});
}

template <int kHeadDim, class T, class Policy, bool kDeterministic>
Status launch_backward(const BackwardParams& params, const Scores& scores, CUstream_st* stream) {
  using Kernel = BackwardSm90<T, kHeadDim, kDeterministic, Policy>;
  using Shape = typename Kernel::Shape;
  using Order = DqOrderSm90<kHeadDim, Policy::kVariant>;
  using Delta = BackwardDelta<T, kHeadDim, Order, Shape::kWarpgroups, Policy>;
  const Problem& p = params.problem;
  typename Kernel::Params launch_params;
  auto& base = launch_params.base;
  base = with_scores<Policy>(
      backward_launch(params, backward_workspace_sm90<kHeadDim, Policy::kVariant>(p)), scores);
  const auto add_up_scores = [&] {
    if constexpr (Policy::kModifies) {
      return launch_score_gradients<T, kHeadDim, Order>(base, stream);
    } else {
      return Status(FLASHTILE_OK);
    }
  };
  if (base.slots_q == 0) return add_up_scores();  // no batch: no map, nothing else to do
  if (Status s = prepare<Kernel>()) return s;
  if (Status s = encode_backward_maps<Shape>(params, launch_params)) return s;
  const int64_t query_blocks = base.slots_q * p.num_heads;
  const int64_t key_blocks = base.slots_k * p.num_heads_kv;
  if (Status s = launch<Delta>(base, query_blocks, stream)) return s;
  if (Status s = launch_prepared<Kernel>(launch_params, key_blocks, stream)) return s;
  if (Status s = launch<BackwardDq<T, kHeadDim, Order, Policy>>(base, query_blocks, stream))
    return s;
  return add_up_scores();
}

template <int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kBackward, Family::kSm90, kHeadDim, kVariant>,
                    const BackwardParams& params, const Scores& scores, const cuda::Device&,
                    CUstream_st* stream) {
  using Policy = ScorePolicyOf<kVariant>;
  return with_dtype(params.problem, [&]<class T>(T) {
    return params.problem.deterministic
               ? launch_backward<kHeadDim, T, Policy, true>(params, scores, stream)
               : launch_backward<kHeadDim, T, Policy, false>(params, scores, stream);
  });
}

}  // namespace flashtile
