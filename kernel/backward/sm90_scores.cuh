// From S^T to dS^T: what the sm_90a backward does with a warp's scores between the products.
#pragma once

#include "backward/sm90_mask.cuh"

namespace flashtile {

// Blocks of queries: clean ones are whole and seen whole. Huge: exp2(S - lse) may be anything, see
// BackwardDelta.
enum class QueryBlock { kClean, kEdge, kHuge };

template <class T, class Shape>
struct BackwardScores {
  using Scores = typename Shape::Scores;
  using Packed = typename Shape::Packed;
  static constexpr int kBlocks = Shape::kBlockQ / 8;
  using Seen = SeenPairs<kBlocks>;
  static constexpr int kKeyThreads = Shape::kBlockK / 16 * 32;  // a warp has 16 keys

  // The lane's part of the statistics of a stage. `thread`, here and below: 0 to 255.
  static FLASHTILE_DEVICE uint32_t statistics(uint32_t smem, int stage, int thread) {
    return smem + Shape::kStatistics + stage * Shape::kStatisticsBytes + thread % 4 * 16;
  }

  // Of 16 queries, and of eight.
  static FLASHTILE_DEVICE float4 lse(uint32_t statistics, int n16) {
    return ptx::lds_f32x4(statistics + n16 * 192);
  }
  static FLASHTILE_DEVICE float4 minus_delta(uint32_t statistics, int n8) {
    return ptx::lds_f32x4(statistics + n8 / 2 * 192 + 64 + n8 % 2 * 64);
  }

  // 2^x; of huge scores at most 1.
  template <QueryBlock kBlock>
  static FLASHTILE_DEVICE float exponential(float x) {
    return ptx::ex2(kBlock == QueryBlock::kHuge ? ptx::min_nan(x, 0.0f) : x);
  }
  // S^T -> P^T = exp2(S^T scale_log2 - lse)
  template <QueryBlock kBlock>
  static FLASHTILE_DEVICE void probabilities(Scores& s, uint32_t statistics, float scale_log2) {
    FLASHTILE_UNROLL
    for (int n16 = 0; n16 < kBlocks / 2; ++n16) {
      const float4 of_queries = lse(statistics, n16);
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& first = s.d[0][2 * n16][i];
        float& second = s.d[0][2 * n16 + 1][i];
        first =
            exponential<kBlock>(first * scale_log2 - (i % 2 == 0 ? of_queries.x : of_queries.y));
        second =
            exponential<kBlock>(second * scale_log2 - (i % 2 == 0 ? of_queries.z : of_queries.w));
      }
    }
  }
  // What dP^T starts from: -delta, in every row.
  static FLASHTILE_DEVICE void start_from_delta(Scores& ds, uint32_t statistics) {
    FLASHTILE_UNROLL
    for (int n = 0; n < kBlocks; ++n) assign(ds.d[0][n], minus_delta(statistics, n));
  }
  // dP^T - delta -> dS^T
  static FLASHTILE_DEVICE void multiply(Scores& ds, const Scores& p) {
    for_each(ds, [&](float& d, int, int n, int i) { d *= p.d[0][n][i]; });
  }

  // Of the block of queries that begins at q0.
  template <QueryBlock kBlock>
  static FLASHTILE_DEVICE Seen seen_pairs(uint32_t smem, int q0, int thread) {
    if constexpr (kBlock == QueryBlock::kClean) return Seen();
    return Seen(LaneBand(read_notes<BandNotes>(smem + Shape::kNotes), q0, thread % kKeyThreads));
  }
  // As register operands, 0 where hidden.
  template <QueryBlock kBlock>
  static FLASHTILE_DEVICE void pack(Packed& packed, const Scores& x, const Seen& seen) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlocks / 2; ++k) {
      to_operand<T>(packed[k], x, 0, k);
      if constexpr (kBlock != QueryBlock::kClean) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) packed[k][i] &= seen.pair(2 * k + i / 2, i % 2);
      }
    }
  }

  // dS^T, register operands, to dS in shared memory, where products may read it.
  static FLASHTILE_DEVICE void store(uint32_t tile, const Packed& packed, int thread) {
    const int lane = thread % 32;
    const int query = lane / 16 * 8 + lane % 8;
    const int chunk = thread % kKeyThreads / 32 * 2 + lane / 8 % 2;
    const uint32_t place = tile + Shape::ScoreTile::offset(query, chunk);
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlocks / 2; ++k)
      ptx::stmatrix_x4_trans(place + k * 16 * kPanelRowBytes, packed[k]);
    ptx::fence_proxy_async_shared();
  }
};

}  // namespace flashtile
