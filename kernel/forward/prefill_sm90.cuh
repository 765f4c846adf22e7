// The forward's loop for sm_90a (forward/sm90.cuh) over a key/value cache, for the sequences that
// have more queries than decoding serves. What differs is where the keys come from: TMA loads a
// block in pieces from several pages where it can, else four warps copy it row by row. Both leave
// the same bytes in shared memory, so a row's bits do not depend on its pages.
#pragma once

#include "forward/prefill_sm90_boxes.cuh"
#include "forward/prefill_sm90_rows.cuh"

namespace flashtile {

template <class Kernel>
Status launch_prefill_boxes(const ForwardParams& params, const Scores& scores,
                            CUstream_st* stream) {
  if (Status s = prepare<Kernel>()) return s;
  const int box_rows = page_box_rows(params.problem.cache, Kernel::kKeys);
  PageBoxesParams p{{}, PrefillTiles(params.problem), box_rows};
  if (Status s = set_forward_sm90_params<Kernel>(params, p)) return s;
  if (Status s = set_key_boxes(params, box_rows, p)) return s;
  return launch_prepared<Kernel>(with_hooks<Kernel>(p, p.problem, scores), p.tiles, stream);
}

template <class Kernel>
Status launch_prefill_rows(const ForwardParams& params, const Scores& scores, CUstream_st* stream) {
  if (Status s = prepare<Kernel>()) return s;
  PageRowsParams p{{}, PrefillTiles(params.problem), params.k, params.v};
  if (Status s = set_forward_sm90_params<Kernel>(params, p)) return s;
  return launch_prepared<Kernel>(with_hooks<Kernel>(p, p.problem, scores), p.tiles, stream);
}

template <int kHeadDim, class T, class Policy>
Status launch_prefill_sm90_kernel(const ForwardParams& params, const Scores& scores,
                                  CUstream_st* stream) {
  using Boxes = ForwardSm90<kHeadDim, T, PageBoxKeys, Policy>;
  using Rows = ForwardSm90<kHeadDim, T, PageRowKeys, Policy>;
  if constexpr (Policy::kModifies) {
    if (Status s = clear_max_logit<Boxes>(params.problem, scores, stream)) return s;
  }
  if (query_tile_count(params.problem, 1) == 0) return FLASHTILE_OK;
  return page_obstacle(params.problem.cache) ? launch_prefill_rows<Rows>(params, scores, stream)
                                             : launch_prefill_boxes<Boxes>(params, scores, stream);
}

template <int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kPrefill, Family::kSm90, kHeadDim, kVariant>,
                    const ForwardParams& params, const Scores& scores, const cuda::Device&,
                    CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    return launch_prefill_sm90_kernel<kHeadDim, T, ScorePolicyOf<kVariant>>(params, scores, stream);
  });
}

}  // namespace flashtile
