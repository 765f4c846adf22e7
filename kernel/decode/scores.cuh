// What decoding's loops do to scores: nothing in the plain variant.
#pragma once

#include "decode/work.cuh"
#include "tile/packed_scores.cuh"

namespace flashtile {

template <class Policy>
struct DecodeScores {
  FLASHTILE_DEVICE DecodeScores(const DecodeParams&, const DecodeWork&, int) {}
  FLASHTILE_DEVICE void end_part() const {}
};

template <>
struct DecodeScores<ModifiedScores> {
  using Params = ModifiedScores::WithScores<DecodeParams>;
  const ScoreParams& params;
  PackedPlace place;

  // The warp's packed rows begin at `row0`.
  FLASHTILE_DEVICE DecodeScores(const Params& p, const DecodeWork& work, int row0)
      : params(p.scores),
        place(work.sequence,
              p.forward.problem.band.top_left ? 0 : work.sequence.seqlen_k - work.sequence.seqlen_q,
              work.kv_head * p.plan.group, p.plan.group, row0, work.rows) {}

  template <int kKeys>
  FLASHTILE_DEVICE void to_logits(Accumulator<16, kKeys>& s, int key) const {
    PackedLogits::to_logits(s, params, place, key);
  }
  template <int kKeys>
  FLASHTILE_DEVICE void keep_tops(const Accumulator<16, kKeys>& s) {
    if (params.of.max_logit.exists()) PackedLogits::keep_tops(s, place);
  }
  FLASHTILE_DEVICE void end_part() const {
    if (params.of.max_logit.exists()) PackedLogits::raise_max_logit(params.of.max_logit, place);
  }
};

}  // namespace flashtile
