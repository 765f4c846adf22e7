// One block of queries in the sm_90a backward, where each warpgroup has half of the keys.
//
// P^T and dS^T stay in registers; dS of both halves meets in shared memory, since each warpgroup
// needs all keys for its part of dQ.
#pragma once

#include <type_traits>

#include "backward/sm90_weights.cuh"
#include "backward/store.cuh"
#include "tile/product_sm90.cuh"

namespace flashtile {

// Dq: how dQ gets to the workspace (backward/sm90_dq.cuh).
template <class T, class Shape, class Dq>
struct BackwardHalves {
  using Words = BackwardScores<T, Shape>;
  using Weights = BackwardWeights<T, Shape>;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  using ScoreTile = typename Shape::ScoreTile;
  using Scores = typename Shape::Scores;
  using Packed = typename Shape::Packed;
  using Gradient = typename Shape::Gradient;
  using Ring = typename Shape::QueryRing;
  // dV runs while dS is computed, where there are registers for P^T in fp32 and in 16 bits.
  static constexpr bool kEarlyDv = Shape::kBlockQ == 64;
  static constexpr bool kHasScores = Shape::Policy::kModifies;
  static_assert(kEarlyDv || !kHasScores);
  // dP runs while P is computed, where what scores do leaves registers for it.
  static constexpr bool kEarlyDp = !kHasScores || Shape::kHeadDim == 64;

  struct Nothing {};

  const typename Shape::Launch& launch;
  uint32_t smem;
  TileDescriptors tiles;
  int kept_thread;
  int use = 0;  // of the rings
  Gradient dk, dv;

  FLASHTILE_DEVICE BackwardHalves(const typename Shape::Launch& launch, uint32_t smem)
      : launch(launch), smem(smem), tiles(smem), kept_thread(ptx::thread_index()) {
    clear(dk);
    clear(dv);
  }

  // Asked again each time where no register is left.
  FLASHTILE_DEVICE int thread() const { return kEarlyDv ? kept_thread : ptx::thread_index(); }

  template <QueryBlock kBlock>
  FLASHTILE_DEVICE typename Words::Seen seen_pairs(int slot, int first_slot) const {
    return Words::template seen_pairs<kBlock>(smem, (slot - first_slot) * Shape::kBlockQ, thread());
  }
  FLASHTILE_DEVICE typename Weights::Tile weight_tile(int slot, int first_slot) const {
    return {smem, (slot - first_slot) * Shape::kBlockQ, Ring::stage(use), thread()};
  }
  // dP^T - delta = V dO^T - delta, of the keys from byte kFirstRow of their tile on.
  template <int kFirstRow>
  FLASHTILE_DEVICE void issue_dp(Scores& ds, uint32_t statistics) const {
    Words::start_from_delta(ds, statistics);
    ptx::wgmma_fence();
    issue_ABt<T, KeyTile, QueryTile, true>(ds, tiles.at<KeyTile>(Shape::kV + kFirstRow), dout());
    ptx::wgmma_commit();
  }
  // dV += P^T dO
  FLASHTILE_DEVICE void issue_dv(const Packed& p) {
    ptx::wgmma_fence();
    issue_AB<T, QueryTile>(dv, p, dout());
    ptx::wgmma_commit();
  }

  // dK += dS^T Q
  FLASHTILE_DEVICE void issue_dk(const Packed& ds) {
    issue_AB<T, QueryTile>(dk, ds, q());
    ptx::wgmma_commit();
  }
  // dV's product is behind.
  FLASHTILE_DEVICE void release_dout() {
    ptx::keep_in_order(dv.d[0]);  // dO has been read
    if (thread() % 32 == 0) dout_ring().release(use);
  }

  FLASHTILE_DEVICE Ring q_ring() const { return {smem + Shape::kQRing}; }
  FLASHTILE_DEVICE Ring dout_ring() const { return {smem + Shape::kDoutRing}; }
  // Descriptors of the tiles at hand.
  FLASHTILE_DEVICE uint32_t q() const { return tiles.at<QueryTile>(Shape::kQ, Ring::stage(use)); }
  FLASHTILE_DEVICE uint32_t dout() const {
    return tiles.at<QueryTile>(Shape::kDout, Ring::stage(use));
  }
  FLASHTILE_DEVICE uint32_t scores() const {
    return smem + Shape::kScores + use % 2 * ScoreTile::kBytes;
  }

  // S^T to dS^T, rounded, in registers and in shared memory; leaves dV's product in flight.
  template <int kGroup, QueryBlock kBlock>
  FLASHTILE_DEVICE void compute_scores(Packed& packed_ds, int slot, int first_slot) {
    constexpr int kFirstRow = kGroup * Shape::kGroupKeys * kPanelRowBytes;  // of the keys
    const uint32_t statistics = Words::statistics(smem, Ring::stage(use), thread());
    q_ring().wait(use);
    Scores p;
    ptx::wgmma_fence();
    issue_ABt<T, KeyTile, QueryTile>(p, tiles.at<KeyTile>(Shape::kK + kFirstRow),
                                     q());  // S^T = K Q^T
    ptx::wgmma_commit();

    dout_ring().wait(use);
    Scores ds;
    if constexpr (kEarlyDp) issue_dp<kFirstRow>(ds, statistics);
    ptx::wgmma_wait<kEarlyDp ? 1 : 0>();
    ptx::keep_in_order(p.d[0]);  // S^T is there
    if constexpr (!kHasScores)
      Words::template probabilities<kBlock>(p, statistics, launch.scale_log2);
    Packed packed_p;
    typename Words::Seen seen;
    [[maybe_unused]] std::conditional_t<kHasScores, Weights, Nothing> weights;
    if constexpr (kHasScores) {
      seen = seen_pairs<kBlock>(slot, first_slot);
      weights.template weigh<kBlock>(p, packed_p, launch, weight_tile(slot, first_slot), seen);
      issue_dv(packed_p);
      if constexpr (!kEarlyDp) issue_dp<kFirstRow>(ds, statistics);
      ptx::wgmma_wait<kEarlyDp ? 1 : 0>();
    } else if constexpr (kEarlyDv) {
      seen = seen_pairs<kBlock>(slot, first_slot);
      Words::template pack<kBlock>(packed_p, p, seen);
      issue_dv(packed_p);
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    ptx::keep_in_order(ds.d[0]);  // dP^T - delta is there
    if constexpr (kHasScores) {
      if (launch.scores.changes_dp)
        weights.change_dp(ds, launch.scores, weight_tile(slot, first_slot));
    }
    Words::multiply(ds, p);
    if constexpr (!kEarlyDv) {
      seen = seen_pairs<kBlock>(slot, first_slot);
      Words::template pack<kBlock>(packed_p, p, seen);
      issue_dv(packed_p);
    }
    Words::template pack<kBlock>(packed_ds, ds, seen);
    Words::store(scores(), packed_ds, thread());
  }

  // The block at `slot` of the workspace; the first of its head lies at `first_slot`.
  template <int kGroup, QueryBlock kBlock>
  FLASHTILE_DEVICE void step(int slot, int first_slot) {
    Packed ds;
    compute_scores<kGroup, kBlock>(ds, slot, first_slot);
    // dS of the block is complete. The products that read its place two blocks ago are done:
    // each warpgroup waited for them before it stored dS of the last block.
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);

    if constexpr (Shape::dq_cols(kGroup) > 0) {
      Accumulator<16, Shape::dq_cols(kGroup)> dq;
      constexpr int kDqRow = Shape::kSplitRows ? kGroup * 64 * kPanelRowBytes : 0;
      ptx::wgmma_fence();
      issue_AB<T, ScoreTile, KeyTile>(
          dq, tiles.at<ScoreTile>(Shape::kScores + kDqRow, use % 2),
          tiles.at<KeyTile>(Shape::kK + Shape::dq_panel(kGroup) * KeyTile::kPanelBytes));
      ptx::wgmma_commit();  // dQ = dS K
      issue_dk(ds);
      ptx::wgmma_wait<2>();
      release_dout();
      ptx::wgmma_wait<1>();
      ptx::keep_in_order(dq.d[0]);  // dQ is there
      Dq::template add<kGroup>(launch, smem, slot, dq, thread());
    } else {
      ptx::wgmma_fence();
      issue_dk(ds);
      ptx::wgmma_wait<1>();
      release_dout();
    }
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(dk.d[0]);  // Q has been read
    if (thread() % 32 == 0) q_ring().release(use);
    ++use;
  }

  // dK and dV into tiles, as they are stored.
  template <int kGroup>
  FLASHTILE_DEVICE void stage_gradients(uint32_t dk_tile, uint32_t dv_tile) const {
    const int thread = ptx::thread_index(), lane = thread % 32, key = thread / 32 * 16;
    using Tile = typename Shape::GradientTile;
    store_shared<T, Tile>(dk_tile, key, lane, dk, Scale{launch.params.problem.softmax_scale});
    store_shared<T, Tile>(dv_tile, key, lane, dv, Scale{1.0f});
  }
};

}  // namespace flashtile
