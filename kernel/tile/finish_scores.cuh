// What a forward with scores does with a warp's rows of O when all keys have been seen.
#pragma once

#include "finish_rows.cuh"
#include "scores.cuh"

namespace flashtile {

// A row's sink * log2(e), of queries in use; -inf: none.
FLASHTILE_DEVICE float sink_log2(const ScoreView& sink, const RowBlock& work, int query) {
  if (!sink.exists() || query >= work.sequence.seqlen_q) return negative_infinity();
  const Sequence& s = work.sequence;
  return number_of(sink, s.index * sink.stride_batch + work.head * sink.stride_head +
                             (s.row_q + query) * sink.stride_q) *
         kLog2e;
}

// log2 of a sum of exponentials with one more; what of the whole the sum was.
struct JoinedSum {
  float log2, share;

  FLASHTILE_DEVICE JoinedSum(float sum_log2, float one_log2) : log2(sum_log2), share(1.0f) {
    if (one_log2 == negative_infinity()) return;
    share = ptx::rcp(1.0f + ptx::ex2(one_log2 - sum_log2));
    log2 = fmaxf(sum_log2, one_log2) + __log2f(1.0f + ptx::ex2(-fabsf(one_log2 - sum_log2)));
  }
};

// The same with scores: rows may be hidden as a whole, sinks join the sum, and dropout has a
// factor.
struct ScoredProblem {
  const Problem& problem;
  const ScoreParams& scores;
};
template <int kRows, int kCols>
FLASHTILE_DEVICE RowFactors<kRows> finish_rows(const ScoredProblem& scored, const RowView& lse,
                                               const RowBlock& work, const WarpLane& warp,
                                               Accumulator<kRows, kCols>& o,
                                               const OnlineSoftmax<kRows>& softmax) {
  const Sequence& sequence = work.sequence;
  const BandMask mask = band_mask(scored.problem, sequence);
  const Scores& scores = scored.scores.of;
  const float kept = scores.dropout.exists() ? static_cast<float>(scores.dropout.scale) : 1.0f;
  float* const lse_rows = row_address(lse, sequence, sequence.row_q, work.head) + work.row0;
  RowFactors<kRows> factors;
  __syncwarp();  // lanes read shifts that others have stored
  for_each_row<kRows>([&](int m, int half) {
    const int row = warp.row + accumulator_row(warp.lane, m, 2 * half);
    const float sum = softmax.row_sum(m, half);
    const int query = work.row0 + row;
    const bool in_use = query < sequence.seqlen_q;
    const bool empty = !in_use || mask.sees_no_key(query) || sum == 0.0f;
    const float sink = sink_log2(scores.sink, work, query);
    const JoinedSum whole(softmax.log_sum(m, half, sum).value(softmax.scale_log2), sink);
    factors.of[m][half] = whole.share * kept / sum;
    if (empty) clear_row(o, m, half, factors.of[m][half]);
    if (lse.data != nullptr && warp.lane % 4 == 0 && row < work.owned)
      lse_rows[row] = (empty ? sink : whole.log2) * kLn2;
  });
  return factors;
}

}  // namespace flashtile
