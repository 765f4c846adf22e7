// The warp that loads, in the sm_90a backward: one thread issues all copies of a thread block.
#pragma once

#include "backward/sm90_shape.cuh"
#include "tile/tma_rows.cuh"

namespace flashtile {

template <class Shape>
struct BackwardProducer {
  using KeyTile = typename Shape::KeyTile;
  using Tile = typename Shape::QueryTile;
  using Ring = typename Shape::QueryRing;

  const BackwardLaunchSm90<typename Shape::Policy>& launch;
  uint32_t smem;

  // K, V, then all blocks of queries of the heads that share them.
  FLASHTILE_DEVICE void run() const {
    const Problem& p = launch.base.params.problem;
    const uint32_t notes = smem + Shape::kNotes;
    const RangeNotes range = read_notes<RangeNotes>(notes);
    if (range.begin >= range.end) return;
    const RowNotes where = read_notes<RowNotes>(notes);
    const BandNotes band = read_notes<BandNotes>(notes);
    const HeadNotes heads = read_notes<HeadNotes>(notes);
    TmaRows rows = {where.key_row, band.keys, heads.head_kv, where.batch};
    const uint32_t keys_full = smem + Shape::kKeysFull;
    ptx::mbarrier_arrive_expect_tx(keys_full, 2 * KeyTile::kBytes);
    load_tile<KeyTile>(smem + Shape::kK, launch.k, keys_full, rows);
    load_tile<KeyTile>(smem + Shape::kV, launch.v, keys_full, rows);

    const int group = static_cast<int>(p.group());
    int slot = band.first_slot + range.begin;
    int use = 0;  // of the rings
    rows.head = heads.head_kv * group;
    FLASHTILE_ROLL
    for (int i = 0; i < group; ++i) {
      const float* statistics = Shape::Slot::statistics(launch.base, slot);
      rows.row = where.query_row + range.begin * Shape::kBlockQ;
      rows.count = where.seqlen_q - range.begin * Shape::kBlockQ;
      FLASHTILE_ROLL
      for (int blocks = range.end - range.begin; blocks > 0; --blocks, ++use) {
        load_queries(use, statistics, rows);
        statistics += Shape::Slot::kStatistics;
        rows.row += Shape::kBlockQ;
        rows.count -= Shape::kBlockQ;
      }
      slot += static_cast<int>(launch.base.slots_q);
      ++rows.head;
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
