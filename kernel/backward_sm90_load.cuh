// The warp that loads, in the sm_90a backward: one thread issues all copies of a thread block.
#pragma once

#include "backward_sm90_shape.cuh"
#include "tile/tma_rows.cuh"

namespace flashtile {

template <class Shape>
struct BackwardProducer {
  using KeyTile = typename Shape::KeyTile;
  using Tile = typename Shape::QueryTile;
  using Ring = typename Shape::QueryRing;

  const BackwardLaunchSm90& launch;
  uint32_t smem;

  // K, V, then all blocks of queries of the heads that share them.
  FLASHTILE_DEVICE void run(const RowBlock& block, const BlockRange& range) const {
    const Problem& p = launch.base.params.problem;
    const Sequence& s = block.sequence;
    TmaRows rows = {static_cast<int>(s.row_k) + block.row0, block.rows, block.head,
                    static_cast<int>(s.batch)};
    const uint32_t keys_full = smem + Shape::kKeysFull;
    ptx::mbarrier_arrive_expect_tx(keys_full, 2 * KeyTile::kBytes);
    load_tile<KeyTile>(smem + Shape::kK, launch.k, keys_full, rows);
    load_tile<KeyTile>(smem + Shape::kV, launch.v, keys_full, rows);

    const int group = static_cast<int>(p.num_heads / p.num_heads_kv);
    int use = 0;  // of the rings
    FLASHTILE_ROLL
    for (int head = block.head * group; head < (block.head + 1) * group; ++head) {
      const float* statistics = launch.base.statistics +
                                (head * launch.base.slots_q + block.first_slot_q + range.begin) *
                                    Shape::Slot::kStatistics;
      rows.head = head;
      rows.row = static_cast<int>(s.row_q) + range.begin * Shape::kBlockQ;
      rows.count = s.seqlen_q - range.begin * Shape::kBlockQ;
      FLASHTILE_ROLL
      for (int i = range.begin; i < range.end; ++i, ++use) {
        load_queries(use, statistics, rows);
        statistics += Shape::Slot::kStatistics;
        rows.row += Shape::kBlockQ;
        rows.count -= Shape::kBlockQ;
      }
    }
  }

 private:
  FLASHTILE_DEVICE void load_queries(int use, const float* statistics, const TmaRows& rows) const {
    const int stage = Ring::stage(use);
    const Ring q_ring = {smem + Shape::kQRing}, dout_ring = {smem + Shape::kDoutRing};
    q_ring.acquire(use, Tile::kBytes);
    load_tile<Tile>(smem + Shape::kQ + stage * Tile::kBytes, launch.q, q_ring.full(use), rows);
    dout_ring.acquire(use, Tile::kBytes + Shape::kStatisticsBytes);
    load_tile<Tile>(smem + Shape::kDout + stage * Tile::kBytes, launch.dout, dout_ring.full(use),
                    rows);
    ptx::bulk_load(smem + Shape::kStatistics + stage * Shape::kStatisticsBytes, statistics,
                   Shape::kStatisticsBytes, dout_ring.full(use));
  }
};

}  // namespace flashtile
