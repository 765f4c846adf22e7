// Main launch of the backward on sm_90a (FlashAttention-2, Algorithm 2): one block of keys against
// all queries that see it. One warp loads through TMA; two warpgroups compute with wgmma, each for
// half of the keys.
//
// Scores are computed transposed, S^T = K Q^T: their accumulators, rounded to 16 bits, already are
// the register operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, to be
// the operand of dQ = dS K, which both warpgroups need whole. kernel/README.md has the pictures.
#pragma once

#include <type_traits>

#include "backward_sm80_store.cuh"
#include "backward_sm90_load.cuh"
#include "backward_sm90_mask.cuh"
#include "backward_sm90_products.cuh"
#include "backward_sm90_turns.cuh"
#include "ptx/reduce.cuh"

namespace flashtile {

template <class T, int kHeadDim, bool kDeterministic>
struct BackwardSm90 {
  using Params = BackwardLaunchSm90;
  using Shape = BackwardShapeSm90<kHeadDim>;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  using ScoreTile = typename Shape::ScoreTile;
  using Scores = typename Shape::Scores;
  using Gradient = typename Shape::Gradient;
  using Slot = typename Shape::Slot;
  using Ring = typename Shape::QueryRing;
  using Turns = std::conditional_t<kDeterministic, GroupTurns<Shape>, NoGroupTurns>;
  using Packed = uint32_t[Shape::kBlockQ / 16][4];  // P^T, dS^T: register operands, pairs of T
  static constexpr int kBlockQ = Shape::kBlockQ;
  static constexpr int kBlockK = Shape::kBlockK;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Shape::kBytes;
  static constexpr int kScoreBlocks = kBlockQ / 8;

  // Blocks of queries: kClean ones are whole and seen whole. kHuge: exp2(S - lse) may be anything,
  // see BackwardDelta.
  enum Block { kClean, kEdge, kHuge };

  // Of a thread of warpgroup kGroup.
  struct State {
    uint32_t smem;
    int thread;         // 0 to 255
    uint32_t ds_place;  // where the lane stores its first row of dS
    LaneBand band;
    int seqlen_q;
    float scale_log2;
    int use = 0;  // of the rings
    float* dq;  // the lane's first float4 of the block at hand
    Turns turns;
    Gradient dk, dv;
  };

  // S^T -> P^T = exp2(S^T scale_log2 - lse)
  static FLASHTILE_DEVICE void probabilities(Scores& s, uint32_t statistics, float scale_log2) {
    FLASHTILE_UNROLL
    for (int n16 = 0; n16 < kBlockQ / 16; ++n16) {
      const float4 lse = ptx::lds_f32x4(statistics + n16 * 192);
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& first = s.d[0][2 * n16][i];
        float& second = s.d[0][2 * n16 + 1][i];
        first = ptx::ex2(first * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
        second = ptx::ex2(second * scale_log2 - (i % 2 == 0 ? lse.z : lse.w));
      }
    }
  }
  // What dP^T starts from: -delta, in every row.
  static FLASHTILE_DEVICE void start_from_delta(Scores& ds, uint32_t statistics) {
    FLASHTILE_UNROLL
    for (int n = 0; n < kScoreBlocks; ++n) {
      const float4 x = ptx::lds_f32x4(statistics + n / 2 * 192 + 64 + n % 2 * 64);
      ds.d[0][n][0] = x.x;
      ds.d[0][n][1] = x.y;
      ds.d[0][n][2] = x.z;
      ds.d[0][n][3] = x.w;
    }
  }

  template <Block kBlock>
  static FLASHTILE_DEVICE void pack(Packed& packed, const Scores& x,
                                    const SeenPairs<kScoreBlocks>& seen) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlockQ / 16; ++k) {
      to_operand<T>(packed[k], x, 0, k);
      if constexpr (kBlock != kClean) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) packed[k][i] &= seen.pair(2 * k + i / 2, i % 2);
      }
    }
  }

  // One block of queries.
  template <int kGroup, Block kBlock>
  static FLASHTILE_DEVICE void step(State& my, int query_block) {
    constexpr int kFirstKey = kGroup * Shape::kGroupKeys;
    const int use = my.use, stage = Ring::stage(use);
    const Ring q_ring = {my.smem + Shape::kQRing}, dout_ring = {my.smem + Shape::kDoutRing};
    const uint32_t q = my.smem + Shape::kQ + stage * QueryTile::kBytes;
    const uint32_t dout = my.smem + Shape::kDout + stage * QueryTile::kBytes;
    const uint32_t scores = my.smem + Shape::kScores + stage * ScoreTile::kBytes;
    const uint32_t statistics = my.smem + Shape::kStatistics + stage * Shape::kStatisticsBytes +
                                my.thread % 4 * 16;
    q_ring.wait(use);
    Scores p;
    ptx::wgmma_fence();
    issue_ABt<T, KeyTile, QueryTile>(p, tile_descriptor<KeyTile>(my.smem + Shape::kK, kFirstKey),
                                     tile_descriptor<QueryTile>(q));  // S^T = K Q^T
    ptx::wgmma_commit();

    dout_ring.wait(use);
    Scores ds;
    start_from_delta(ds, statistics);
    ptx::wgmma_fence();
    issue_add_ABt<T, KeyTile, QueryTile>(
        ds, tile_descriptor<KeyTile>(my.smem + Shape::kV, kFirstKey),
        tile_descriptor<QueryTile>(dout));  // dP^T - delta = V dO^T - delta
    ptx::wgmma_commit();

    ptx::wgmma_wait<1>();
    ptx::keep_in_order(p.d[0]);  // S^T is there
    probabilities(p, statistics, my.scale_log2);
    if constexpr (kBlock == kHuge) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kScoreBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) p.d[0][n][i] = ptx::min_nan(p.d[0][n][i], 1.0f);
      }
    }
    const SeenPairs<kScoreBlocks> seen(my.band, query_block * kBlockQ);
    Packed packed_p;
    pack<kBlock>(packed_p, p, seen);
    ptx::wgmma_fence();
    issue_AB<T, QueryTile>(my.dv, packed_p, tile_descriptor<QueryTile>(dout));  // dV += P^T dO
    ptx::wgmma_commit();

    ptx::wgmma_wait<1>();
    ptx::keep_in_order(ds.d[0]);  // dP^T - delta is there
    FLASHTILE_UNROLL
    for (int n = 0; n < kScoreBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) ds.d[0][n][i] *= p.d[0][n][i];
    }
    Packed packed_ds;
    pack<kBlock>(packed_ds, ds, seen);
    const uint32_t ds_place = my.ds_place + stage * ScoreTile::kBytes;
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlockQ / 16; ++k) {
      ptx::stmatrix_x4_trans(ds_place + k * 16 * kPanelRowBytes, packed_ds[k]);
    }
    ptx::fence_proxy_async_shared();
    // dS of the block is complete. Two blocks ago its place was read: by products that whoever
    // stored dS of the last block had waited for.
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);

    Accumulator<16, Shape::kDqCols> dq;
    constexpr int kDqRow = Shape::kSplitColumns ? 0 : kGroup * 64;
    constexpr int kDqPanel = Shape::kSplitColumns ? kGroup * Shape::kDqCols / kPanelCols : 0;
    ptx::wgmma_fence();
    issue_shared_AB<T, ScoreTile, KeyTile>(
        dq, tile_descriptor<ScoreTile>(scores, kDqRow),
        tile_descriptor<KeyTile>(my.smem + Shape::kK + kDqPanel * KeyTile::kPanelBytes));
    ptx::wgmma_commit();  // dQ = dS K
    issue_AB<T, QueryTile>(my.dk, packed_ds, tile_descriptor<QueryTile>(q));  // dK += dS^T Q
    ptx::wgmma_commit();

    ptx::wgmma_wait<2>();
    ptx::keep_in_order(my.dv.d[0]);  // dO has been read
    if (my.thread % 32 == 0) dout_ring.release(use);
    ptx::wgmma_wait<1>();
    ptx::keep_in_order(dq.d[0]);  // dQ is there
    my.turns.template wait<kGroup>(query_block);
    FLASHTILE_UNROLL
    for (int n = 0; n < Shape::kDqCols / 8; ++n)
      ptx::red_add(my.dq + n * DqOrderSm90<kHeadDim>::kBlockFloats, dq.d[0][n]);
    my.turns.template pass<kGroup>();
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(my.dk.d[0]);  // Q has been read
    if (my.thread % 32 == 0) q_ring.release(use);
    my.dq += Slot::kDq;
    ++my.use;
  }

  // Whether some query of these blocks has scores so large that exp2(score - lse) may be anything
  // (see BackwardDelta). Every warp asks for itself.
  static FLASHTILE_DEVICE bool has_huge_scores(const float* statistics, int blocks, int lane) {
    bool huge = false;
    for (int i = lane; i < blocks; i += 32)
      huge |= statistics[int64_t{i} * Slot::kStatistics + Slot::kHuge] != 0.0f;
    return __any_sync(0xffffffffu, huge) != 0;
  }

  // All blocks of queries of one head that see the keys.
  template <int kGroup>
  static FLASHTILE_DEVICE void walk(const BackwardLaunch& launch, State& my, const RowBlock& block,
                                    const BlockRange& range, int head) {
    const int64_t slot = head * launch.slots_q + block.first_slot_q + range.begin;
    my.dq = launch.dq_accumulator + slot * Slot::kDq + my.thread * 4;
    my.turns.start(launch, slot);
    int i = range.begin;
    if (has_huge_scores(launch.statistics + slot * Slot::kStatistics, range.end - range.begin,
                        my.thread % 32)) {
      FLASHTILE_ROLL
      for (; i < range.end; ++i) step<kGroup, kHuge>(my, i);
      return;
    }
    const int clean_end = min(range.full_end, my.seqlen_q / kBlockQ);
    FLASHTILE_ROLL
    for (int until = range.full_begin;; until = range.end) {
      FLASHTILE_ROLL
      for (; i < until; ++i) step<kGroup, kEdge>(my, i);
      FLASHTILE_ROLL
      for (; i < clean_end; ++i) step<kGroup, kClean>(my, i);
      if (i >= range.end) break;
    }
  }

  template <int kGroup>
  static FLASHTILE_DEVICE void consume(const BackwardLaunch& launch, uint32_t smem,
                                       const RowBlock& block, const BandMask& mask,
                                       const BlockRange& range) {
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread % 128 / 32;
    const int key = kGroup * Shape::kGroupKeys + warp * 16;
    State my{.smem = smem,
             .thread = thread,
             .ds_place = smem + Shape::kScores +
                         ScoreTile::offset(lane / 16 * 8 + lane % 8, key / 8 + lane / 8 % 2),
             .band = LaneBand(mask, block.row0, block.rows, key + lane / 4, lane),
             .seqlen_q = block.sequence.seqlen_q,
             .scale_log2 = launch.scale_log2,
             .dq = nullptr,
             .turns = Turns(mask, block)};
    clear(my.dk);
    clear(my.dv);
    if (!range.empty()) {
      ptx::mbarrier_wait(smem + Shape::kKeysFull, 0);
      const int group = static_cast<int>(launch.params.problem.num_heads /
                                         launch.params.problem.num_heads_kv);
      FLASHTILE_ROLL
      for (int head = block.head * group; head < (block.head + 1) * group; ++head)
        walk<kGroup>(launch, my, block, range, head);
    }
    store(launch, smem, block, my.dk, my.dv, key);
  }

  // dK and dV to global memory, in the places of K and V.
  static FLASHTILE_DEVICE void store(const BackwardLaunch& launch, uint32_t smem,
                                     const RowBlock& block, const Gradient& dk, const Gradient& dv,
                                     int key) {
    using Copy = RowCopy<KeyTile, Shape::kConsumers>;
    const BackwardParams& p = launch.params;
    const int thread = ptx::thread_index();
    const uint32_t dk_tile = smem + Shape::kK, dv_tile = smem + Shape::kV;
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // nobody reads K and V any more
    stage_gradient<T, KeyTile, 1>(dk_tile, dk, p.problem.softmax_scale, key, 0, thread % 32);
    stage_gradient<T, KeyTile, 1>(dv_tile, dv, 1.0f, key, 0, thread % 32);
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // dK and dV are complete
    store_rows<Copy, KeyTile>(p.dk, launch.dk, block, dk_tile, thread);
    store_rows<Copy, KeyTile>(p.dv, launch.dv, block, dv_tile, thread);
  }

  static FLASHTILE_DEVICE void init_barriers(uint32_t smem) {
    ptx::mbarrier_init(smem + Shape::kKeysFull, 1);
    Ring{smem + Shape::kQRing}.init(Shape::kConsumers / 32);
    Ring{smem + Shape::kDoutRing}.init(Shape::kConsumers / 32);
    ptx::fence_mbarrier_init();
  }

  static FLASHTILE_DEVICE int work_index(const BackwardLaunch& launch, char* shared) {
    if constexpr (!kDeterministic) return ptx::block_index();
    return take_ticket(GroupTurns<Shape>::tickets(launch), shared);
  }

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    const Problem& problem = launch.base.params.problem;
    const int index = work_index(launch.base, shared);
    const RowBlock block =
        row_block<Rows::kKeys, kBlockK, kBlockQ>(problem, launch.base.slots_k, index);
    if (block.empty()) return;
    const uint32_t smem = ptx::shared_address(shared);
    if (ptx::thread_index() == 0) init_barriers(smem);
    __syncthreads();  // the barriers exist
    const BandMask mask(problem.band, block.sequence.seqlen_q, block.sequence.seqlen_k);
    const BlockRange range =
        block.rows > 0 ? mask.query_blocks(block.row0, kBlockK, kBlockQ) : BlockRange{0, 0, 0, 0};
    const int warp = ptx::warp_uniform(ptx::thread_index() / 32);
    if (warp >= Shape::kConsumers / 32) {
      ptx::setmaxnreg_dec<24>();
      if (warp == Shape::kConsumers / 32 && !range.empty() && ptx::elect_one())
        BackwardProducer<Shape>{launch, smem}.run(block, range);
    } else {
      ptx::setmaxnreg_inc<240>();
      if (warp < Shape::kGroupThreads / 32) {
        consume<0>(launch.base, smem, block, mask, range);
      } else {
        consume<1>(launch.base, smem, block, mask, range);
      }
    }
  }
};

}  // namespace flashtile
