// What the pieces of the backward's main loop have in common: the sizes, types and warp grids that
// follow from the config row.
#pragma once

#include "backward/tile.cuh"

namespace flashtile {

template <int kHeadDim, Memory kMemory, Variant kVariant = Variant::kPlain>
struct BackwardShape {
  using Smem = BackwardSmem<kHeadDim, kMemory, kVariant>;
  using Dq = DqOrder<kHeadDim, kMemory, kVariant>;
  using QueryTile = typename Smem::QueryTile;
  using KeyTile = typename Smem::KeyTile;
  using ScoreTile = typename Smem::ScoreTile;
  static constexpr BackwardConfig kConfig = Smem::kConfig;
  static constexpr int kThreads = 32 * kConfig.warps();
  static constexpr int kBlockQ = kConfig.block_q;
  static constexpr int kBlockK = kConfig.block_k;
  static constexpr int kKeys = kBlockK / kConfig.warps_k;     // of one warp
  static constexpr int kQueries = kBlockQ / kConfig.warps_q;  // of one warp's scores
  // dK, dV and V of 32 keys take 160 of the 255 registers: the rest must do with fewer.
  static constexpr bool kCrowded = kConfig.v_in_registers && kKeys == 32;
  static constexpr int kPiece = kCrowded ? 16 : kQueries;  // queries of dS at a time
  using GradColumns = ColumnSplit<kHeadDim, kConfig.split_head_dim ? kConfig.warps_q : 1>;
  using DqColumns = typename Dq::Columns;
  static constexpr bool kPairs = kConfig.warps_q == 2;  // of warps that exchange scores
  static constexpr int kHalfBytes =
      kQueries * QueryTile::kPanelRowBytes;     // from one warp's queries to the next's
  using Scores = Accumulator<kKeys, kQueries>;  // S^T, P^T, dP^T, dS^T: [key, query]
  using Packed = PackedScores<kKeys, kQueries>;
  using Gradient = Accumulator<kKeys, GradColumns::kCols>;  // dK, dV: [key, head_dim]
  // Addresses of the main loop, one register each.
  using KeyRows = LaneAddress<KeyTile, 1>;
  using QueryRows = LaneAddress<QueryTile, 1>;
  using ScoreRows = LaneAddress<ScoreTile, 1>;
  using KeyColumns = LaneAddress<KeyTile, 1, Dq::kWarpCols>;
  using QueryColumns = LaneAddress<QueryTile, 1, kConfig.split_head_dim ? kConfig.warps_q : 1>;
  using QueryCopy = RowCopy<QueryTile, kThreads>;
  using KeyCopy = RowCopy<KeyTile, kThreads>;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;

  // Places of a warp in the three warp grids: keys x queries of the scores, queries x columns of
  // dQ.
  struct Warp {
    int lane, index, key, query, dq_row, dq_col;

    FLASHTILE_DEVICE explicit Warp(unsigned thread)
        : lane(thread % 32),
          index(thread / 32),
          key(index / kConfig.warps_q),
          query(index % kConfig.warps_q),
          dq_row(index / Dq::kWarpCols),
          dq_col(index % Dq::kWarpCols) {}
  };
};

}  // namespace flashtile
