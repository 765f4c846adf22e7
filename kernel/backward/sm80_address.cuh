// The lane's shared memory addresses in the backward's main loop, and its view of the mask.
#pragma once

#include "backward/sm80_shape.cuh"

namespace flashtile {

// The lane's shared memory addresses of one stage; flip() moves them to the other stage.
template <class Shape>
struct Stage {
  using Smem = typename Shape::Smem;
  static constexpr auto kConfig = Shape::kConfig;
  static constexpr auto kQueries = Shape::kQueries;

  // Of Q; dO lies further on.
  typename Shape::QueryRows rows;     // the warp's queries: B of S^T = K Q^T
  typename Shape::QueryColumns cols;  // queries, the warp's columns: B of dK += dS^T Q
  uint32_t statistics;
  int step;

  FLASHTILE_DEVICE Stage(uint32_t stages, const typename Shape::Warp& warp)
      : rows(first(stages), Lanes::kColsFirst, warp.lane, warp.query * kQueries),
        cols(first(stages), Lanes::kRowsFirst, warp.lane, Shape::kPairs ? warp.query * kQueries : 0,
             kConfig.split_head_dim ? Shape::GradColumns::first_chunk(warp.query) : 0),
        statistics((Smem::kTogether ? first(stages) : stages) + Smem::kStatistics +
                   warp.query * kQueries * 12 + warp.lane % 4 * 16),
        step(-Smem::kStageBytes) {}

  FLASHTILE_DEVICE void flip(uint32_t& fill) {
    if constexpr (kConfig.stages_q == 2) {
      rows.move(step);
      cols.move(step);
      if constexpr (Smem::kTogether) statistics += step;
      fill -= step;
      step = -step;
    }
    rows.opaque();
    cols.opaque();
  }
  // Where only Q has two places: the same address as in Q's first stage. kDout leads on from it.
  template <class Address>
  FLASHTILE_DEVICE Address of_dout(Address address) const {
    if constexpr (!Smem::kTogether) address.move(-((Smem::kStageBytes - step) / 2));
    return address;
  }
  FLASHTILE_DEVICE float4 lse(int n16) const { return ptx::lds_f32x4(statistics + n16 * 192); }
  FLASHTILE_DEVICE float4 minus_delta(int n8) const {
    return ptx::lds_f32x4(statistics + n8 / 2 * 192 + 64 + n8 % 2 * 64);
  }

 private:
  // The stage before the first flip: the second one, where there are two.
  static FLASHTILE_DEVICE uint32_t first(uint32_t stages) {
    return stages + (kConfig.stages_q - 1) * Smem::kStageBytes;
  }
};

// Which of the lane's scores are hidden by the mask or by the end of the keys. Hidden
// probabilities are written as -0, which exp2 never gives: they add nothing, and carry the
// outcome to dS. The others are at most 1: huge scores make every block an edge (is_huge).
template <class Shape>
struct EdgeTest {
  static constexpr auto kKeys = Shape::kKeys;
  static constexpr auto kQueries = Shape::kQueries;

  static FLASHTILE_DEVICE void mask(typename Shape::Scores& p, int query_block,
                                    uint32_t notes_address) {
    const EdgeNotes notes = read_notes<EdgeNotes>(notes_address);
    const typename Shape::Warp warp(ptx::thread_index());
    const int lane_key = warp.key * kKeys + warp.lane / 4;
    const int query = query_block * Shape::kBlockQ + warp.query * kQueries + warp.lane % 4 * 2;
    const int diagonal = notes.diagonal + lane_key - query;
    const int keys_left = notes.keys - lane_key;
    FLASHTILE_UNROLL
    for (int m = 0; m < kKeys / 16; ++m) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = 16 * m + 8 * (i / 2);
        const unsigned seen = key < keys_left ? notes.queries : 0u;
        const int first = diagonal + key;
        FLASHTILE_UNROLL
        for (int n = 0; n < kQueries / 8; ++n) {
          const bool sees = static_cast<unsigned>(8 * n + i % 2 - first) < seen;
          p.d[m][n][i] = sees ? ptx::min_nan(p.d[m][n][i], 1.0f) : -0.0f;
        }
      }
    }
  }
  static FLASHTILE_DEVICE bool hidden(float p) { return __float_as_int(p) < 0; }
};

// The lane's shared memory addresses that stay where they are.
template <class Shape>
struct Places {
  using Smem = typename Shape::Smem;
  using ScoreRows = typename Shape::ScoreRows;
  static constexpr auto kKeys = Shape::kKeys;
  static constexpr auto kQueries = Shape::kQueries;

  typename Shape::KeyRows k_rows;     // the warp's keys: A of S^T = K Q^T (and V, further on)
  typename Shape::KeyColumns k_cols;  // all keys, the warp's columns of dQ: B of dQ = dS K
  ScoreRows dq_rows;                  // all keys, the warp's queries of dQ: A of dQ = dS K
  ScoreRows partner;  // the warp's keys, the partner's (all) queries (P^T further on)
  uint32_t scores;    // the lane's first pair of its own scores

  FLASHTILE_DEVICE Places(uint32_t smem, const typename Shape::Warp& warp)
      : k_rows(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, warp.key * kKeys),
        k_cols(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, 0,
               Shape::DqColumns::first_chunk(warp.dq_col)),
        dq_rows(smem + Smem::kScores, Lanes::kColsFirst, warp.lane, 0,
                warp.dq_row * Shape::Dq::kRows / 8),
        partner(smem + Smem::kScores, Lanes::kRowsFirst, warp.lane, warp.key * kKeys,
                Shape::kPairs ? (1 - warp.query) * kQueries / 8 : 0),
        scores(
            smem + Smem::kScores + warp.lane % 4 * 4 +
            ScoreRows::Tile::offset(warp.key * kKeys + warp.lane / 4, warp.query * kQueries / 8)) {}

  // Keeps the compiler from computing all the addresses that follow from these before the loop. (It
  // does no good where a warp has all of its keys' queries to itself.)
  FLASHTILE_DEVICE void opaque() {
    if constexpr (Shape::kConfig.split_head_dim || Shape::kCrowded) k_rows.opaque();
    if constexpr (Shape::kCrowded) {
      k_cols.opaque();
      dq_rows.opaque();
      ptx::opaque(scores);
    }
  }
};

}  // namespace flashtile
