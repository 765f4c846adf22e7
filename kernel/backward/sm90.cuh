// Main launch of the backward on sm_90a (FlashAttention-2, Algorithm 2): one block of keys against
// all queries that see it. One warp loads through TMA; two warpgroups compute with wgmma, each for
// half of the keys; up to head dim 128 a warp for each of them adds its dQ to the workspace.
//
// Scores are computed transposed, S^T = K Q^T: their accumulators, rounded to 16 bits, already are
// the register operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, to be
// the operand of dQ = dS K, which both warpgroups need whole. docs/kernels/backward.md has the
// pictures.
#pragma once

#include <type_traits>

#include "backward/sm90_dq.cuh"
#include "backward/sm90_halves.cuh"
#include "backward/sm90_load.cuh"
#include "backward/sm90_roles.cuh"

namespace flashtile {

template <class T, int kHeadDim, bool kDeterministic, class Policy = PlainScores>
struct BackwardSm90 {
  using ScorePolicy = Policy;
  using Params = BackwardLaunchSm90<Policy>;
  using Shape = BackwardShapeSm90<kHeadDim, Policy::kVariant>;
  using Launch = typename Shape::Launch;
  using Slot = typename Shape::Slot;
  using Ring = typename Shape::QueryRing;
  using Turns = std::conditional_t<kDeterministic, GroupTurns<Shape>, NoGroupTurns>;
  using Dq = std::conditional_t<Shape::kBulkReduce, StagedDq<Shape>, DirectDq<Shape, Turns>>;
  using Consumer =
      std::conditional_t<Shape::kRoles, BackwardRoles<T, Shape, Dq>, BackwardHalves<T, Shape, Dq>>;
  static constexpr int kBlockQ = Shape::kBlockQ;
  static constexpr int kBlockK = Shape::kBlockK;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Shape::kBytes;

  // All blocks of queries of one head that see the keys; the sequence's first is at `first_slot`.
  template <int kGroup>
  static FLASHTILE_DEVICE void walk(Consumer& my, int first_slot) {
    const uint32_t notes = my.smem + Shape::kNotes;
    const RangeNotes range = read_notes<RangeNotes>(notes);
    int slot = first_slot + range.begin;
    if constexpr (Policy::kModifies) note_scores(my, first_slot);
    const float* const statistics = Slot::statistics(my.launch, slot);
    const bool huge = Slot::template has_huge_scores<32>(statistics, ptx::thread_index() % 32,
                                                         range.end - range.begin);
    if (__any_sync(0xffffffffu, huge) != 0) {  // every warp asks for itself
      const int end = first_slot + range.end;
      FLASHTILE_ROLL
      for (; slot < end; ++slot) my.template step<kGroup, QueryBlock::kHuge>(slot, first_slot);
      return;
    }
    int until = first_slot + range.full_begin;
    FLASHTILE_ROLL
    while (true) {
      FLASHTILE_ROLL
      for (; slot < until; ++slot) my.template step<kGroup, QueryBlock::kEdge>(slot, first_slot);
      until = first_slot + read_notes<RangeNotes>(notes).clean_end;
      FLASHTILE_ROLL
      for (; slot < until; ++slot) my.template step<kGroup, QueryBlock::kClean>(slot, first_slot);
      until = first_slot + read_notes<RangeNotes>(notes).end;
      if (slot >= until) break;
    }
  }

  // The notes of the warp's scores, of the head that begins at `first_slot`: every warp has its
  // own, for one may be a head ahead of another.
  static FLASHTILE_DEVICE void note_scores(const Consumer& my, int first_slot) {
    const Launch& launch = my.launch;
    __syncwarp();  // all lanes are done with the notes of the head before
    if (ptx::thread_index() % 32 == 0) {
      const RowBlock block =
          key_block(launch, read_notes<HeadNotes>(my.smem + Shape::kNotes).index);
      TransposedNotes::write(launch.params.problem, launch.scores, block,
                             first_slot / static_cast<int>(launch.slots_q),
                             Consumer::Weights::Tile::notes(my.smem, ptx::thread_index()));
    }
    __syncwarp();  // the notes are there
  }

  // One past the last head's first_slot.
  static FLASHTILE_DEVICE int end_of_heads(const BackwardLaunch& launch, uint32_t notes) {
    const Problem& p = launch.params.problem;
    const int group = static_cast<int>(p.group());
    return read_notes<BandNotes>(notes).first_slot + group * static_cast<int>(launch.slots_q);
  }

  template <int kGroup>
  static FLASHTILE_DEVICE void consume(const Launch& launch, uint32_t smem) {
    Consumer my(launch, smem);
    const uint32_t notes = smem + Shape::kNotes;
    const RangeNotes range = read_notes<RangeNotes>(notes);
    if (range.begin < range.end) {
      ptx::mbarrier_wait(smem + Shape::kKeysFull, 0);
      int first_slot = read_notes<BandNotes>(notes).first_slot;
      FLASHTILE_ROLL
      do {
        walk<kGroup>(my, first_slot);
        first_slot += static_cast<int>(launch.slots_q);
      } while (first_slot < end_of_heads(launch, notes));
    }
    if (ptx::thread_index() % Shape::kGroupThreads == 0)
      Dq::template finish<kGroup>(launch, read_notes<HeadNotes>(notes).index);
    store<kGroup>(my);
  }

  // dK and dV to global memory, through the places of K and V.
  template <int kGroup>
  static FLASHTILE_DEVICE void store(const Consumer& my) {
    using Tile = typename Shape::GradientTile;
    using Copy = RowCopy<Tile, Shape::kConsumers>;
    const BackwardLaunch& launch = my.launch;
    const BackwardParams& p = launch.params;
    const uint32_t dk_tile = my.smem + Shape::kK, dv_tile = my.smem + Shape::kV;
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // all are done with K and V
    my.template stage_gradients<kGroup>(dk_tile, dv_tile);
    ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);  // dK and dV are complete
    // Found again here, so that nothing of it was kept in registers during the main loop.
    const RowBlock block = key_block(launch, read_notes<HeadNotes>(my.smem + Shape::kNotes).index);
    const int thread = ptx::thread_index();
    if (Copy::chunk(thread) * 8 >= kHeadDim) return;  // not written
    store_rows<Copy, Tile>(p.dk, launch.dk, block, dk_tile, thread);
    store_rows<Copy, Tile>(p.dv, launch.dv, block, dv_tile, thread);
  }

  static FLASHTILE_DEVICE RowBlock key_block(const BackwardLaunch& launch, int index) {
    return row_block<Side::kKeys, kBlockK, kBlockQ>(launch.params.problem, launch.slots_k, index);
  }

  // By one thread.
  static FLASHTILE_DEVICE void prepare(const BackwardLaunch& launch, uint32_t smem,
                                       const RowBlock& block, int index) {
    const Problem& p = launch.params.problem;
    const Sequence& s = block.sequence;
    const uint32_t notes = smem + Shape::kNotes;
    const BandMask mask = band_mask(p, s);
    const BlockRange range =
        block.rows > 0 ? mask.query_blocks(block.row0, kBlockK, kBlockQ) : BlockRange{0, 0, 0, 0};
    const int group = static_cast<int>(p.group());
    write_notes(notes, RangeNotes{.begin = range.begin,
                                  .full_begin = range.full_begin,
                                  .clean_end = min(range.full_end, s.seqlen_q / kBlockQ),
                                  .end = range.end});
    write_notes(notes, BandNotes{.begin = block.row0 - mask.highest + 1,
                                 .end = block.row0 - mask.lowest + 1,
                                 .keys = block.rows,
                                 .first_slot = static_cast<int>(
                                     block.head * group * launch.slots_q + block.first_slot_q)});
    write_notes(notes, RowNotes{.key_row = static_cast<int>(s.row_k) + block.row0,
                                .query_row = static_cast<int>(s.row_q),
                                .seqlen_q = s.seqlen_q,
                                .batch = static_cast<int>(s.batch)});
    const int next = block.row0 + kBlockK;  // the key block whose turn is before ours
    write_notes(
        notes,
        HeadNotes{.head_kv = block.head,
                  .index = index,
                  .before = TurnOrder::before(launch, block, index, kBlockK),
                  .before_from =
                      next < s.seqlen_k ? mask.query_blocks(next, kBlockK, kBlockQ).begin : 0});
    ptx::mbarrier_init(smem + Shape::kKeysFull, 1);
    Ring{smem + Shape::kQRing}.init(Shape::kConsumers / 32);
    Ring{smem + Shape::kDoutRing}.init(Shape::kConsumers / 32);
    ptx::fence_mbarrier_init();
  }

  // Warp `warp` of those that do not compute.
  static FLASHTILE_DEVICE void assist(const Params& launch, uint32_t smem, int warp) {
    if (warp == 0) {
      if (ptx::elect_one()) BackwardProducer<Shape>{launch, smem}.run();
    } else if constexpr (Shape::kBulkReduce) {
      const DqReducer<Shape, Turns> reducer = {launch.base, smem};
      if (warp == 1) {
        reducer.template run<0>();
      } else if (warp == 2) {
        if constexpr (Shape::dq_cols(1) > 0) reducer.template run<1>();
      }
    }
  }

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    const int index = Turns::take_work(launch.base, shared + Shape::kNotes);
    const uint32_t smem = ptx::shared_address(shared);
    const int thread = ptx::thread_index();
    const RowBlock block = key_block(launch.base, index);
    if (block.empty()) {
      if (thread == 0) Turns::template finish<0>(launch.base, index);
      if (thread == 0) Turns::template finish<1>(launch.base, index);
      return;
    }
    if (thread == 0) prepare(launch.base, smem, block, index);
    __syncthreads();  // the notes and the mbarriers are there
    const int warp = ptx::warp_uniform(thread / 32);
    if (warp >= Shape::kConsumers / 32) {
      ptx::setmaxnreg_dec<24>();
      assist(launch, smem, warp - Shape::kConsumers / 32);
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
