// One block of queries in the sm_90a backward, where the two warpgroups have the same 64 keys and
// share the products: the first computes S, P and dV, the second dP, dS and dK, and each a part of
// dQ.
//
//   first    S^T = K Q^T | exp, P -> | dV += P^T dO            | dQ = dS K | add
//   second   dP^T = V dO^T          | dS = P dP, dS -> | dQ = dS K, dK += dS^T Q | add
//
// P goes from the first to the second through shared memory, as the lanes hold it; dS from the
// second to both. Each has one place: the first stores P only after it has read dS of the block
// before, and the second had read P before it stored that dS.
#pragma once

#include "backward/sm90_weights.cuh"
#include "backward/store.cuh"
#include "tile/product_sm90.cuh"
#include "tile/unpack.cuh"

namespace flashtile {

// Dq: how dQ gets to the workspace (backward/sm90_dq.cuh).
template <class T, class Shape, class Dq>
struct BackwardRoles {
  using Words = BackwardScores<T, Shape>;
  using Weights = BackwardWeights<T, Shape>;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  using ScoreTile = typename Shape::ScoreTile;
  using Scores = typename Shape::Scores;
  using Packed = typename Shape::Packed;
  using Gradient = typename Shape::Gradient;
  using Ring = typename Shape::QueryRing;
  static constexpr bool kHasScores = Shape::Policy::kModifies;

  const typename Shape::Launch& launch;
  uint32_t smem;
  TileDescriptors tiles;
  int thread;         // 0 to 255
  int use = 0;        // of the rings
  Gradient gradient;  // dV of the first warpgroup, dK of the second

  FLASHTILE_DEVICE BackwardRoles(const typename Shape::Launch& launch, uint32_t smem)
      : launch(launch), smem(smem), tiles(smem), thread(ptx::thread_index()) {
    clear(gradient);
  }

  FLASHTILE_DEVICE Ring q_ring() const { return {smem + Shape::kQRing}; }
  FLASHTILE_DEVICE Ring dout_ring() const { return {smem + Shape::kDoutRing}; }
  // Descriptors of the tiles at hand.
  FLASHTILE_DEVICE uint32_t q() const { return tiles.at<QueryTile>(Shape::kQ, Ring::stage(use)); }
  FLASHTILE_DEVICE uint32_t dout() const {
    return tiles.at<QueryTile>(Shape::kDout, Ring::stage(use));
  }
  FLASHTILE_DEVICE bool is_first_lane() const { return thread % 32 == 0; }
  // Where the lane's P lies, of 16 queries.
  FLASHTILE_DEVICE uint32_t exchange() const {
    return smem + Shape::kExchange + thread % Shape::kGroupThreads * 16;
  }
  static constexpr int kExchangeStep = Shape::kGroupThreads * 16;
  // To the second warpgroup.
  FLASHTILE_DEVICE void send(const Packed& packed) const {
    FLASHTILE_UNROLL
    for (int k = 0; k < Shape::kBlockQ / 16; ++k) {
      const uint32_t (&x)[4] = packed[k];
      ptx::sts_u32x4(exchange() + k * kExchangeStep, make_uint4(x[0], x[1], x[2], x[3]));
    }
  }

  // With scores: the bits of dropout go the same way, and instead of P the weights.
  static_assert(sizeof(Weights::kept) == 4);
  FLASHTILE_DEVICE uint32_t kept_place() const {
    return smem + Shape::kKept + thread % Shape::kGroupThreads * 4;
  }
  FLASHTILE_DEVICE typename Weights::Tile weight_tile(int slot, int first_slot) const {
    return {smem, (slot - first_slot) * Shape::kBlockQ, Ring::stage(use), thread};
  }
  // S^T -> P^T for dV; sends what makes dS of dP - delta.
  template <QueryBlock kBlock>
  FLASHTILE_DEVICE void weigh(Packed& packed, Scores& p, int slot, int first_slot) const {
    Weights weights;
    const auto seen_here = seen<kBlock>(slot, first_slot);
    weights.template weigh<kBlock>(p, packed, launch, weight_tile(slot, first_slot), seen_here);
    Packed sent;
    Words::template pack<kBlock>(sent, p, seen_here);
    send(sent);
    if (launch.scores.of.dropout.exists()) ptx::sts_u32(kept_place(), weights.kept[0]);
  }
  FLASHTILE_DEVICE void change_dp(Scores& ds, int slot, int first_slot) const {
    Weights weights;
    weights.kept[0] = launch.scores.of.dropout.exists() ? ptx::lds_u32(kept_place()) : 0;
    weights.change_dp(ds, launch.scores, weight_tile(slot, first_slot));
  }

  template <QueryBlock kBlock>
  FLASHTILE_DEVICE typename Words::Seen seen(int slot, int first_slot) const {
    return Words::template seen_pairs<kBlock>(smem, (slot - first_slot) * Shape::kBlockQ, thread);
  }

  // Issues dQ = dS K, the warpgroup's columns.
  template <int kGroup, int kCols>
  FLASHTILE_DEVICE void issue_dq(Accumulator<16, kCols>& dq) const {
    issue_AB<T, ScoreTile, KeyTile>(
        dq, tiles.at<ScoreTile>(Shape::kScores),
        tiles.at<KeyTile>(Shape::kK + Shape::dq_panel(kGroup) * KeyTile::kPanelBytes));
    ptx::wgmma_commit();
  }

  template <QueryBlock kBlock>
  FLASHTILE_DEVICE void first(int slot, int first_slot) {
    q_ring().wait(use);
    Scores p;
    ptx::wgmma_fence();
    issue_ABt<T, KeyTile, QueryTile>(p, tiles.at<KeyTile>(Shape::kK),
                                     q());  // S^T = K Q^T
    ptx::wgmma_commit();
    dout_ring().wait(use);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(p.d[0]);
    if (is_first_lane()) q_ring().release(use);
    Packed packed;
    if constexpr (kHasScores) {
      weigh<kBlock>(packed, p, slot, first_slot);
    } else {
      Words::template probabilities<kBlock>(p, Words::statistics(smem, Ring::stage(use), thread),
                                            launch.scale_log2);
      Words::template pack<kBlock>(packed, p, seen<kBlock>(slot, first_slot));
      send(packed);
    }
    ptx::named_barrier_arrive(kProbabilitiesThere, Shape::kConsumers);
    ptx::wgmma_fence();
    issue_AB<T, QueryTile>(gradient, packed, dout());
    ptx::wgmma_commit();  // dV += P^T dO

    ptx::named_barrier_sync(kScoresThere, Shape::kConsumers);
    Accumulator<16, Shape::dq_cols(0)> dq;
    ptx::wgmma_fence();
    issue_dq<0>(dq);
    ptx::wgmma_wait<1>();
    ptx::keep_in_order(gradient.d[0]);
    if (is_first_lane()) dout_ring().release(use);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(dq.d[0]);
    Dq::template add<0>(launch, smem, slot, dq, thread);
  }

  template <QueryBlock kBlock>
  FLASHTILE_DEVICE void second(int slot, int first_slot) {
    dout_ring().wait(use);
    Scores ds;
    Words::start_from_delta(ds, Words::statistics(smem, Ring::stage(use), thread));
    ptx::wgmma_fence();
    issue_ABt<T, KeyTile, QueryTile, true>(ds, tiles.at<KeyTile>(Shape::kV), dout());
    ptx::wgmma_commit();  // dP^T - delta = V dO^T - delta
    q_ring().wait(use);
    ptx::named_barrier_sync(kProbabilitiesThere, Shape::kConsumers);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(ds.d[0]);
    if constexpr (kHasScores) {
      if (launch.scores.changes_dp) change_dp(ds, slot, first_slot);
    }
    if (is_first_lane()) dout_ring().release(use);
    FLASHTILE_UNROLL
    for (int k = 0; k < Shape::kBlockQ / 16; ++k) {
      const uint4 x = ptx::lds_u32x4(exchange() + k * kExchangeStep);
      const uint32_t packed[4] = {x.x, x.y, x.z, x.w};
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(packed[i]);
        ds.d[0][2 * k + i / 2][i % 2 * 2] *= pair.x;
        ds.d[0][2 * k + i / 2][i % 2 * 2 + 1] *= pair.y;
      }
    }
    Packed packed;
    Words::template pack<kBlock>(packed, ds, seen<kBlock>(slot, first_slot));
    Words::store(smem + Shape::kScores, packed, thread);
    ptx::named_barrier_sync(kOwnGroup + 1, Shape::kGroupThreads);  // dS is complete
    ptx::named_barrier_arrive(kScoresThere, Shape::kConsumers);

    Accumulator<16, Shape::dq_cols(1)> dq;
    ptx::wgmma_fence();
    issue_dq<1>(dq);
    issue_AB<T, QueryTile>(gradient, packed, q());
    ptx::wgmma_commit();  // dK += dS^T Q
    ptx::wgmma_wait<1>();
    ptx::keep_in_order(dq.d[0]);
    Dq::template add<1>(launch, smem, slot, dq, thread);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(gradient.d[0]);
    if (is_first_lane()) q_ring().release(use);
  }

  // The block at `slot` of the workspace; the first of its head lies at `first_slot`.
  template <int kGroup, QueryBlock kBlock>
  FLASHTILE_DEVICE void step(int slot, int first_slot) {
    if constexpr (kGroup == 0) {
      first<kBlock>(slot, first_slot);
    } else {
      second<kBlock>(slot, first_slot);
    }
    ++use;
  }

  // dK or dV into its tile, as it is stored.
  template <int kGroup>
  FLASHTILE_DEVICE void stage_gradients(uint32_t dk_tile, uint32_t dv_tile) const {
    store_shared<T, KeyTile>(kGroup == 0 ? dv_tile : dk_tile,
                             thread % Shape::kGroupThreads / 32 * 16, thread % 32, gradient,
                             Scale{kGroup == 0 ? 1.0f : launch.params.problem.softmax_scale});
  }
};

}  // namespace flashtile
