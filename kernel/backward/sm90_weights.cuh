// What flashtile_scores has between the products of the sm_90a backward, for a warp's tile of S^T:
// from S^T to P^T in 16 bits, which dV takes, and to the weights that make dS^T of dP^T - delta.
// The weights are P^T with the derivative of the cap in it, so nothing else outlives P^T but the
// bits of dropout.
#pragma once

#include "backward/sm90_scores.cuh"

namespace flashtile {

// Where a warp's tile lies: in the block of queries that begins at q0, which has come to a stage of
// the rings. Kept so that the path of a cap alone works out none of what it does not need.
template <class Words, class Shape>
struct WeightTile {
  uint32_t smem;
  int q0, stage, thread;  // 0 to 255

  FLASHTILE_DEVICE uint32_t statistics() const { return Words::statistics(smem, stage, thread); }
  static FLASHTILE_DEVICE uint32_t notes(uint32_t smem, int thread) {
    return smem + Shape::kScoreNotes + thread / 32 * TransposedNotes::kBytes;
  }
  FLASHTILE_DEVICE TransposedTile elements() const {
    return {notes(smem, thread), thread % Words::kKeyThreads / 32 * 16, q0};
  }
};

template <class T, class Shape>
struct BackwardWeights : TransposedElements<16, Shape::kBlockQ> {
  using Words = BackwardScores<T, Shape>;
  using Launch = typename Shape::Launch;
  using Scores = typename Shape::Scores;
  using Packed = typename Shape::Packed;
  using Seen = typename Words::Seen;
  using Tile = WeightTile<Words, Shape>;

  // S^T -> weights. `packed`: P^T, 0 where hidden or dropped.
  template <QueryBlock kBlock>
  FLASHTILE_DEVICE void weigh(Scores& s, Packed& packed, const Launch& launch, const Tile& tile,
                              const Seen& seen) {
    const ScoreParams& params = launch.scores;
    if (kBlock != QueryBlock::kHuge && params.cap_alone)
      return weigh_capped<kBlock>(s, packed, params, tile, seen);
    const TransposedTile elements = tile.elements();
    this->to_logits(s, params, elements);
    Words::template probabilities<kBlock>(s, tile.statistics(), launch.scale_log2);
    this->draw(s, params, elements);
    Words::template pack<kBlock>(packed, s, seen);
    if (params.of.dropout.exists()) {
      FLASHTILE_UNROLL
      for (int k = 0; k < Shape::kBlockQ / 16; ++k) {
        FLASHTILE_UNROLL
        for (int a = 0; a < 4; ++a) packed[k][a] &= this->kept_pair(0, 2 * k + a / 2, a % 2 * 2);
      }
    }
    this->slope(s, params);
  }

  // dP^T - delta -> what the weights make dS^T of: -delta where P is dropped, and all of it times
  // the query_scale. Where params.changes_dp.
  FLASHTILE_DEVICE void change_dp(Scores& ds, const ScoreParams& params, const Tile& tile) const {
    this->keep_start(ds, 0, params.of.dropout,
                     [&](int n) { return Words::minus_delta(tile.statistics(), n); });
    this->scale(ds, 0, params, tile.elements());
  }

 private:
  // Where the cap is all that there is: one pass, with no slope to keep.
  template <QueryBlock kBlock>
  static FLASHTILE_DEVICE void weigh_capped(Scores& s, Packed& packed, const ScoreParams& params,
                                            const Tile& tile, const Seen& seen) {
    const uint32_t statistics = tile.statistics();
    FLASHTILE_UNROLL
    for (int k = 0; k < Shape::kBlockQ / 16; ++k) {
      const float4 lse = Words::lse(statistics, k);
      FLASHTILE_UNROLL
      for (int a = 0; a < 4; ++a) {
        float (&d)[4] = s.d[0][2 * k + a / 2];
        float p[2];
        FLASHTILE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float of_query = a / 2 == 0 ? (i == 0 ? lse.x : lse.y) : (i == 0 ? lse.z : lse.w);
          p[i] = flashtile::weigh_capped(d[a % 2 * 2 + i], of_query, params);
        }
        packed[k][a] = ptx::pack<T>(p[0], p[1]);
        if constexpr (kBlock != QueryBlock::kClean) packed[k][a] &= seen.pair(2 * k + a / 2, a % 2);
      }
    }
  }
};

}  // namespace flashtile
