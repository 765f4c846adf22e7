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
  using Seen = SeenPairs<Shape::kBlockQ / 8>;
  using Turns = std::conditional_t<kDeterministic, GroupTurns<Shape>, NoGroupTurns>;
  using Packed = uint32_t[Shape::kBlockQ / 16][4];  // P^T, dS^T: register operands, pairs of T
  static constexpr int kBlockQ = Shape::kBlockQ;
  static constexpr int kBlockK = Shape::kBlockK;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Shape::kBytes;
  static constexpr int kScoreBlocks = kBlockQ / 8;
  // dV runs while dS is computed, where there are registers for P^T in fp32 and in 16 bits.
  static constexpr bool kEarlyDv = kBlockQ == 64;

  // Blocks of queries: kClean ones are whole and seen whole. kHuge: exp2(S - lse) may be anything,
  // see BackwardDelta.
  enum Block { kClean, kEdge, kHuge };

  // Of a thread that computes. What is not needed in every step is found again instead of kept.
  struct State {
    const BackwardLaunch& launch;
    uint32_t smem;
    int use = 0;  // of the rings
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
  static FLASHTILE_DEVICE Seen seen_pairs(const State& my, int q0) {
    if constexpr (kBlock == kClean) return Seen();
    return Seen(LaneBand(read_word<BandNotes>(my.smem + Shape::kNotes), q0, ptx::thread_index()));
  }
  // As register operands.
  template <Block kBlock>
  static FLASHTILE_DEVICE void pack(Packed& packed, const Scores& x, const Seen& seen) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlockQ / 16; ++k) {
      to_operand<T>(packed[k], x, 0, k);
      if constexpr (kBlock != kClean) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) packed[k][i] &= seen.pair(2 * k + i / 2, i % 2);
      }
    }
  }
  // dP^T - delta -> dS^T
  static FLASHTILE_DEVICE void multiply(Scores& ds, const Scores& p) {
    FLASHTILE_UNROLL
    for (int n = 0; n < kScoreBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) ds.d[0][n][i] *= p.d[0][n][i];
    }
  }

  // dS^T, register operands, to dS in shared memory.
  static FLASHTILE_DEVICE void store_scores(uint32_t tile, const Packed& packed) {
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int query = lane / 16 * 8 + lane % 8, chunk = thread / 32 * 2 + lane / 8 % 2;
    const uint32_t place = tile + ScoreTile::offset(query, chunk);
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlockQ / 16; ++k)
      ptx::stmatrix_x4_trans(place + k * 16 * kPanelRowBytes, packed[k]);
  }
  // dV += P^T dO
  static FLASHTILE_DEVICE void issue_dv(Gradient& dv, const Packed& p, uint32_t dout) {
    ptx::wgmma_fence();
    issue_AB<T, QueryTile>(dv, p, tile_descriptor<QueryTile>(dout));
    ptx::wgmma_commit();
  }

  // One block of queries: that at `slot` of the workspace, the first of its head at `first_slot`.
  template <int kGroup, Block kBlock>
  static FLASHTILE_DEVICE void step(State& my, int slot, int first_slot) {
    constexpr int kFirstKey = kGroup * Shape::kGroupKeys;
    const int use = my.use, stage = Ring::stage(use);
    const Ring q_ring = {my.smem + Shape::kQRing}, dout_ring = {my.smem + Shape::kDoutRing};
    const uint32_t q = my.smem + Shape::kQ + stage * QueryTile::kBytes;
    const uint32_t dout = my.smem + Shape::kDout + stage * QueryTile::kBytes;
    const uint32_t scores = my.smem + Shape::kScores + stage * ScoreTile::kBytes;
    const uint32_t statistics = my.smem + Shape::kStatistics + stage * Shape::kStatisticsBytes +
                                ptx::thread_index() % 4 * 16;
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
    probabilities(p, statistics, my.launch.scale_log2);
    if constexpr (kBlock == kHuge) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kScoreBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) p.d[0][n][i] = ptx::min_nan(p.d[0][n][i], 1.0f);
      }
    }
    const Seen seen = seen_pairs<kBlock>(my, (slot - first_slot) * kBlockQ);
    Packed packed_p;
    if constexpr (kEarlyDv) {
      pack<kBlock>(packed_p, p, seen);
      issue_dv(my.dv, packed_p, dout);
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    ptx::keep_in_order(ds.d[0]);  // dP^T - delta is there
    Packed packed_ds;
    multiply(ds, p);
    if constexpr (!kEarlyDv) {
      pack<kBlock>(packed_p, p, seen);
      issue_dv(my.dv, packed_p, dout);
    }
    pack<kBlock>(packed_ds, ds, seen);
    store_scores(scores, packed_ds);
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
    if (ptx::thread_index() % 32 == 0) dout_ring.release(use);
    ptx::wgmma_wait<1>();
    ptx::keep_in_order(dq.d[0]);  // dQ is there
    Turns::template wait<kGroup>(my.launch, my.smem + Shape::kNotes, slot, slot - first_slot);
    float* const dq_place =
        my.launch.dq_accumulator + int64_t{slot} * Slot::kDq + ptx::thread_index() * 4;
    FLASHTILE_UNROLL
    for (int n = 0; n < Shape::kDqCols / 8; ++n)
      ptx::red_add(dq_place + n * DqOrderSm90<kHeadDim>::kBlockFloats, dq.d[0][n]);
    Turns::template pass<kGroup>(my.launch, slot);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(my.dk.d[0]);  // Q has been read
    if (ptx::thread_index() % 32 == 0) q_ring.release(use);
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

  // All blocks of queries of one head that see the keys; the sequence's first is at `first_slot`.
  template <int kGroup>
  static FLASHTILE_DEVICE void walk(State& my, int first_slot) {
    const uint32_t notes = my.smem + Shape::kNotes;
    const RangeNotes range = read_word<RangeNotes>(notes);
    int slot = first_slot + range.begin;
    const float* const statistics = my.launch.statistics + int64_t{slot} * Slot::kStatistics;
    if (has_huge_scores(statistics, range.end - range.begin, ptx::thread_index() % 32)) {
      const int end = first_slot + range.end;
      FLASHTILE_ROLL
      for (; slot < end; ++slot) step<kGroup, kHuge>(my, slot, first_slot);
      return;
    }
    int until = first_slot + range.full_begin;
    FLASHTILE_ROLL
    while (true) {
      FLASHTILE_ROLL
      for (; slot < until; ++slot) step<kGroup, kEdge>(my, slot, first_slot);
      until = first_slot + read_word<RangeNotes>(notes).clean_end;
      FLASHTILE_ROLL
      for (; slot < until; ++slot) step<kGroup, kClean>(my, slot, first_slot);
      until = first_slot + read_word<RangeNotes>(notes).end;
      if (slot >= until) break;
    }
  }

  // One past the last head's first_slot.
  static FLASHTILE_DEVICE int end_of_heads(const BackwardLaunch& launch, uint32_t notes) {
    const Problem& p = launch.params.problem;
    const int group = static_cast<int>(p.num_heads / p.num_heads_kv);
    return read_word<BandNotes>(notes).first_slot + group * static_cast<int>(launch.slots_q);
  }

  template <int kGroup>
  static FLASHTILE_DEVICE void consume(const BackwardLaunch& launch, uint32_t smem) {
    State my{.launch = launch, .smem = smem};
    clear(my.dk);
    clear(my.dv);
    const uint32_t notes = smem + Shape::kNotes;
    const RangeNotes range = read_word<RangeNotes>(notes);
    if (range.begin < range.end) {
      ptx::mbarrier_wait(smem + Shape::kKeysFull, 0);
      int first_slot = read_word<BandNotes>(notes).first_slot;
      FLASHTILE_ROLL
      do {
        walk<kGroup>(my, first_slot);
        first_slot += static_cast<int>(launch.slots_q);
      } while (first_slot < end_of_heads(launch, notes));
    }
    store(launch, smem, my.dk, my.dv);
  }

  // dK and dV to global memory, in the places of K and V.
  static FLASHTILE_DEVICE void store(const BackwardLaunch& launch, uint32_t smem,
                                     const Gradient& dk, const Gradient& dv) {
    using Copy = RowCopy<KeyTile, Shape::kConsumers>;
    const BackwardParams& p = launch.params;
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int key = thread / 32 * 16;
    const uint32_t dk_tile = smem + Shape::kK, dv_tile = smem + Shape::kV;
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // nobody reads K and V any more
    stage_gradient<T, KeyTile, 1>(dk_tile, dk, p.problem.softmax_scale, key, 0, lane);
    stage_gradient<T, KeyTile, 1>(dv_tile, dv, 1.0f, key, 0, lane);
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // dK and dV are complete
    // Found again here, so that nothing of it was kept in registers during the main loop.
    const RowBlock block =
        key_block(launch, read_word<HeadNotes>(smem + Shape::kNotes).index);
    store_rows<Copy, KeyTile>(p.dk, launch.dk, block, dk_tile, thread);
    store_rows<Copy, KeyTile>(p.dv, launch.dv, block, dv_tile, thread);
  }

  static FLASHTILE_DEVICE RowBlock key_block(const BackwardLaunch& launch, int index) {
    return row_block<Rows::kKeys, kBlockK, kBlockQ>(launch.params.problem, launch.slots_k, index);
  }

  // By one thread.
  static FLASHTILE_DEVICE void prepare(const BackwardLaunch& launch, uint32_t smem,
                                       const RowBlock& block, int index) {
    const Problem& p = launch.params.problem;
    const Sequence& s = block.sequence;
    const uint32_t notes = smem + Shape::kNotes;
    const BandMask mask(p.band, s.seqlen_q, s.seqlen_k);
    const BlockRange range =
        block.rows > 0 ? mask.query_blocks(block.row0, kBlockK, kBlockQ) : BlockRange{0, 0, 0, 0};
    const int group = static_cast<int>(p.num_heads / p.num_heads_kv);
    write_word(notes, RangeNotes{.begin = range.begin,
                                 .full_begin = range.full_begin,
                                 .clean_end = min(range.full_end, s.seqlen_q / kBlockQ),
                                 .end = range.end});
    write_word(notes, BandNotes{.begin = block.row0 - mask.highest + 1,
                                .end = block.row0 - mask.lowest + 1,
                                .keys = block.rows,
                                .first_slot = static_cast<int>(block.head * group * launch.slots_q +
                                                               block.first_slot_q)});
    write_word(notes, RowNotes{.key_row = static_cast<int>(s.row_k) + block.row0,
                               .query_row = static_cast<int>(s.row_q),
                               .seqlen_q = s.seqlen_q,
                               .batch = static_cast<int>(s.batch)});
    write_word(notes, HeadNotes{.head_kv = block.head,
                                .key_block = block.row0 / kBlockK,
                                .lowest_key = mask.lowest,
                                .index = index});
    ptx::mbarrier_init(smem + Shape::kKeysFull, 1);
    Ring{smem + Shape::kQRing}.init(Shape::kConsumers / 32);
    Ring{smem + Shape::kDoutRing}.init(Shape::kConsumers / 32);
    ptx::fence_mbarrier_init();
  }

  // By all threads.
  static FLASHTILE_DEVICE int work_index(const BackwardLaunch& launch, char* shared) {
    if constexpr (!kDeterministic) return ptx::block_index();
    return take_ticket(GroupTurns<Shape>::tickets(launch), shared);
  }

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    const int index = work_index(launch.base, shared);
    const uint32_t smem = ptx::shared_address(shared);
    const int thread = ptx::thread_index();
    const RowBlock block = key_block(launch.base, index);
    if (block.empty()) return;
    if (thread == 0) prepare(launch.base, smem, block, index);
    __syncthreads();  // the notes and the mbarriers are there
    const int warp = ptx::warp_uniform(thread / 32);
    if (warp >= Shape::kConsumers / 32) {
      ptx::setmaxnreg_dec<24>();
      if (warp == Shape::kConsumers / 32 && ptx::elect_one())
        BackwardProducer<Shape>{launch, smem}.run();
    } else {
      ptx::setmaxnreg_inc<240>();
      if (warp < Shape::kGroupThreads / 32) {
        consume<0>(launch.base, smem);
      } else {
        consume<1>(launch.base, smem);
      }
    }
  }
};

}  // namespace flashtile
