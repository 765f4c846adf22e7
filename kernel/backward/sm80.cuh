// Main launch of the backward (FlashAttention-2, Algorithm 2): one block of keys against all
// queries that see it, with cp.async, ldmatrix and mma.sync m16n8k16.
//
// Scores are computed transposed, S^T = K Q^T: their accumulators, rounded to 16 bits, already are
// the A operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, to be the A
// operand of dQ = dS K, which is added to an fp32 buffer in global memory. dK and dV stay in
// registers over all query heads that share the keys. docs/kernels/backward.md has the pictures.
#pragma once

#include <type_traits>

#include "backward/sm80_address.cuh"
#include "backward/sm80_load.cuh"
#include "backward/store.cuh"
#include "backward/turns.cuh"

namespace flashtile {

template <class T, int kHeadDim, Memory kMemory, bool kDeterministic, class Policy = PlainScores>
struct BackwardSm80 {
  using ScorePolicy = Policy;
  using Params = typename Policy::template WithScores<BackwardLaunch>;
  using Shape = BackwardShape<kHeadDim, kMemory, Policy::kVariant>;
  using Smem = typename Shape::Smem;
  using Dq = typename Shape::Dq;
  using KeyTile = typename Shape::KeyTile;
  using ScoreTile = typename Shape::ScoreTile;
  using DqColumns = typename Shape::DqColumns;
  using QueryColumns = typename Shape::QueryColumns;
  using KeyRows = typename Shape::KeyRows;
  using ScoreRows = typename Shape::ScoreRows;
  using Scores = typename Shape::Scores;
  using Packed = typename Shape::Packed;
  using Gradient = typename Shape::Gradient;
  using Warp = typename Shape::Warp;
  static constexpr auto kConfig = Shape::kConfig;
  static constexpr auto kBlockQ = Shape::kBlockQ;
  static constexpr auto kBlockK = Shape::kBlockK;
  static constexpr auto kKeys = Shape::kKeys;
  static constexpr auto kQueries = Shape::kQueries;
  static constexpr auto kPairs = Shape::kPairs;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Smem::kBytes;
  static constexpr int kExchange = Smem::kExchange - Smem::kScores;  // from dS^T to P^T
  using Loader = QueryLoader<Shape>;
  using V = std::conditional_t<kConfig.v_in_registers, RegisterOperand<KeyRows, kKeys>,
                               SharedOperand<KeyRows, kKeys>>;
  using Turns = std::conditional_t<kDeterministic, DqTurns, NoTurns>;

  // gradient += scores b. Where warps share the columns of the gradient among them, the scores of
  // all their queries: of two, a warp has its own in registers and reads its partner's at
  // `exchange`; of more, it reads all there.
  static FLASHTILE_DEVICE void accumulate(Gradient& gradient, const Packed& scores,
                                          const QueryColumns& b, int b_offset,
                                          const ScoreRows& exchange, int exchange_offset) {
    constexpr bool kExchanged = kConfig.split_head_dim;
    if constexpr (kPairs || !kExchanged) {
      FLASHTILE_UNROLL
      for (int k = 0; k < kQueries / 16; ++k) {
        mma_AB_step<T>(gradient, scores.x[k], b, k, b_offset);
      }
    }
    if constexpr (kExchanged) {
      QueryColumns other_b = b;
      if constexpr (kPairs) {
        other_b.move(Warp(ptx::thread_index()).query == 0 ? Shape::kHalfBytes : -Shape::kHalfBytes);
      }
      FLASHTILE_UNROLL
      for (int k = 0; k < (kPairs ? kQueries : kBlockQ) / 16; ++k) {
        uint32_t a[kKeys / 16][4];
        FLASHTILE_UNROLL
        for (int m = 0; m < kKeys / 16; ++m) {
          ptx::ldmatrix_x4(a[m], exchange.at(16 * m, k, exchange_offset));
        }
        mma_AB_step<T>(gradient, a, other_b, k, b_offset);
      }
    }
  }

  // A barrier of the warps that have the same keys.
  static FLASHTILE_DEVICE void share_scores() {
    ptx::named_barrier_sync(1 + Warp(ptx::thread_index()).key, 32 * kConfig.warps_q);
  }

  // dQ of the whole block of queries, the warp's rows and columns of it, some columns at a time.
  static FLASHTILE_DEVICE void add_dq(float* dq, const ScoreRows& ds,
                                      const typename Shape::KeyColumns& k_cols) {
    constexpr int kPasses = kConfig.dq_passes;
    constexpr int kCols = Dq::kCols / kPasses;
    constexpr int kPanels = kCols / 16 / DqColumns::kBlocksPerPanel;  // from pass to pass
    static_assert(kPasses == 1 || kCols % (16 * DqColumns::kBlocksPerPanel) == 0);
    FLASHTILE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      Accumulator<Dq::kRows, kCols> sum;
      clear(sum);
      FLASHTILE_UNROLL
      for (int k = 0; k < kBlockK / 16; ++k) {
        uint32_t a[Dq::kRows / 16][4];
        FLASHTILE_UNROLL
        for (int m = 0; m < Dq::kRows / 16; ++m) ptx::ldmatrix_x4_trans(a[m], ds.at(16 * k, m));
        mma_AB_step<T>(sum, a, k_cols, k, pass * kPanels * KeyTile::kPanelBytes);
      }
      for_each(sum, [&](float x, int m, int n, int i) {
        const int block = m * (Dq::kCols / 8) + pass * (kCols / 8) + n;
        ptx::red_add(dq + (block * 4 + i) * kThreads, x);
      });
    }
  }

  // S^T -> P^T = exp2(S^T scale_log2 - lse)
  static FLASHTILE_DEVICE void probabilities(Scores& s, const Stage<Shape>& stage,
                                             float scale_log2) {
    FLASHTILE_UNROLL
    for (int n16 = 0; n16 < kQueries / 16; ++n16) {
      const float4 lse = stage.lse(n16);
      FLASHTILE_UNROLL
      for (int m = 0; m < kKeys / 16; ++m) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& first = s.d[m][2 * n16][i];
          float& second = s.d[m][2 * n16 + 1][i];
          first = ptx::ex2(first * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
          second = ptx::ex2(second * scale_log2 - (i % 2 == 0 ? lse.z : lse.w));
        }
      }
    }
  }

  // dP^T - delta -> dS^T, for the n8 blocks of queries from `first` on. A selection where hidden:
  // what stands there may be infinite.
  template <bool kEdge, int kSome>
  static FLASHTILE_DEVICE void multiply(Accumulator<kKeys, kSome>& ds, const Scores& p, int first) {
    for_each(ds, [&](float& x, int m, int n, int i) {
      x *= p.d[m][first + n][i];
      if (kEdge && EdgeTest<Shape>::hidden(p.d[m][first + n][i])) x = 0.0f;
    });
  }

  struct Plain {};  // nothing of scores' elements is kept

  // The state of a thread block that walks over queries.
  struct State {
    Places<Shape> at;
    V v;
    Stage<Shape> stage;
    Loader loader;
    Gradient dk, dv;
    uint32_t notes;
  };

  using Elements =
      std::conditional_t<Policy::kModifies, TransposedElements<kKeys, kQueries>, Plain>;

  static FLASHTILE_DEVICE TransposedTile place(const State& my, int query_block) {
    const Warp warp(ptx::thread_index());
    return {my.notes + Smem::kScoreNotes, warp.key * kKeys,
            query_block * kBlockQ + warp.query * kQueries};
  }

  // With scores: S^T -> P^T as an operand, without what is dropped, and in `s` what makes dS^T of
  // dP^T - delta. Where the cap is all that there is, in one pass, with no derivative to keep.
  template <bool kEdge>
  static FLASHTILE_DEVICE void weigh(Scores& s, Packed& packed, Elements& elements,
                                     const Params& launch, const State& my, int query_block) {
    if (!kEdge && launch.scores.cap_alone) return weigh_capped(s, packed, launch.scores, my.stage);
    const TransposedTile tile = place(my, query_block);
    elements.to_logits(s, launch.scores, tile);
    probabilities(s, my.stage, launch.scale_log2);
    if constexpr (kEdge) EdgeTest<Shape>::mask(s, query_block, my.notes);
    elements.draw(s, launch.scores, tile);
    elements.template pack_kept<T>(packed, s, launch.scores.of.dropout);
    elements.slope(s, launch.scores);
  }
  static FLASHTILE_DEVICE void weigh_capped(Scores& s, Packed& packed, const ScoreParams& params,
                                            const Stage<Shape>& stage) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kQueries / 16; ++k) {
      const float4 lse = stage.lse(k);
      FLASHTILE_UNROLL
      for (int m = 0; m < kKeys / 16; ++m) {
        FLASHTILE_UNROLL
        for (int a = 0; a < 4; ++a) {
          float (&d)[4] = s.d[m][2 * k + a / 2];
          const int i = a % 2 * 2;
          const float first = flashtile::weigh_capped(d[i], a / 2 == 0 ? lse.x : lse.z, params);
          const float second =
              flashtile::weigh_capped(d[i + 1], a / 2 == 0 ? lse.y : lse.w, params);
          packed.x[k][m][a] = ptx::pack<T>(first, second);
        }
      }
    }
  }

  // One block of queries, at `slot` of the workspace. kEdge: some scores may be hidden, and the
  // next block may be ragged or not exist.
  template <bool kEdge>
  static FLASHTILE_DEVICE void step(const Params& launch, State& my, int slot, int first_slot) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the block has landed; all warps are done with the one before and its dS
    Turns::come_to(launch, slot, my.notes);  // nor adds to the dQ of the one before
    my.stage.flip(my.loader.fill);
    my.at.opaque();
    const auto next = kEdge ? RowsToCopy<Shape>::any(launch, slot + 1 - first_slot, my.notes)
                            : RowsToCopy<Shape>::whole(launch);
    if constexpr (kConfig.stages_dout == 2) {
      my.loader.template load<Loader::kAll>(launch, next, slot + 1);
    } else if constexpr (kConfig.stages_q == 2) {
      my.loader.template load<Loader::kQ>(launch, next, slot + 1);
    }

    Scores scores;
    mma_ABt<T>(scores, SharedOperand<KeyRows, kKeys>{my.at.k_rows}, my.stage.rows);  // S^T = K Q^T
    Elements elements;
    Packed packed;
    if constexpr (Policy::kModifies) {
      weigh<kEdge>(scores, packed, elements, launch, my, slot - first_slot);
    } else {
      probabilities(scores, my.stage, launch.scale_log2);
      if constexpr (kEdge) EdgeTest<Shape>::mask(scores, slot - first_slot, my.notes);
      packed.template pack<T>(scores);
    }
    if constexpr (kConfig.split_head_dim) {
      packed.template store<ScoreTile>(my.at.scores + kExchange);
      share_scores();  // P^T of the warp's keys is complete
    }
    accumulate(my.dv, packed, my.stage.of_dout(my.stage.cols), Smem::kDout, my.at.partner,
               kExchange);

    FLASHTILE_UNROLL
    for (int q = 0; q < kQueries; q += Shape::kPiece) {
      Accumulator<kKeys, Shape::kPiece> ds;
      mma_ABt<T>(ds, my.v, my.stage.of_dout(my.stage.rows),
                 Smem::kDout + q * Shape::QueryTile::kPanelRowBytes, [&](int n) {
                   return my.stage.minus_delta(q / 8 + n);
                 });  // dP^T - delta = V dO^T - delta
      if constexpr (Policy::kModifies) {
        elements.keep_start(ds, q / 8, launch.scores.of.dropout,
                            [&](int n) { return my.stage.minus_delta(q / 8 + n); });
      }
      multiply<kEdge>(ds, scores, q / 8);
      if constexpr (Policy::kModifies) {
        elements.scale(ds, q / 8, launch.scores, place(my, slot - first_slot));
      }
      packed.template pack<T>(ds, q / 16);
    }
    if constexpr (kConfig.one_exchange) share_scores();  // P^T of the warp's keys has been read
    packed.template store<ScoreTile>(my.at.scores);
    Turns::wait(launch, slot, my.notes);
    __syncthreads();  // dS of the block is complete; all warps are done with its dO
    if constexpr (kConfig.stages_dout == 1)
      my.loader.template load<Loader::kDout>(launch, next, slot + 1);
    accumulate(my.dk, packed, my.stage.cols, 0, my.at.partner, 0);
    if constexpr (kConfig.stages_q == 1) {
      __syncthreads();  // all warps are done with Q of the block
      my.loader.template load<Loader::kQ>(launch, next, slot + 1);
    }
    add_dq(Shape::Slot::dq(launch, slot) + ptx::thread_index(), my.at.dq_rows, my.at.k_cols);
  }

  // All blocks of queries of one head that see the keys, `range` of them.
  static FLASHTILE_DEVICE void walk(const Params& launch, State& my, const RowBlock& block,
                                    const BlockRange& range, int head) {
    const Sequence& s = block.sequence;
    const int first_slot = static_cast<int>(head * launch.slots_q + block.first_slot_q);
    int slot = first_slot + range.begin;
    // Clean blocks are those that are seen whole and followed by a whole one.
    const bool huge = __syncthreads_or(Shape::Slot::template has_huge_scores<kThreads>(
        Shape::Slot::statistics(launch, slot), ptx::thread_index(), range.end - range.begin));
    const int whole_end = min(range.end, s.seqlen_q / kBlockQ);
    if (ptx::thread_index() == 0) {
      const int clean_end = huge ? slot : first_slot + min(range.full_end, whole_end - 1);
      write_notes(my.notes, QueryNotes{s.seqlen_q, range.end, clean_end});
      if constexpr (Policy::kModifies) {
        TransposedNotes::write(launch.params.problem, launch.scores, block, head,
                               my.notes + Smem::kScoreNotes);
      }
    }
    __syncthreads();  // the notes are there; dQ of the head before is complete
    Turns::come_to(launch, slot, my.notes);
    my.loader.start(launch, s, range.begin * kBlockQ, head);
    // Into the stage that is not read: see step.
    const auto first = RowsToCopy<Shape>::any(launch, range.begin, my.notes);
    my.loader.template load<Loader::kAll>(launch, first, slot);

    const int edge_end = first_slot + range.full_begin, end = first_slot + range.end;
    for (int until = edge_end;; until = end) {
      for (; slot < until; ++slot) step<true>(launch, my, slot, first_slot);
      for (; slot < QueryNotes::read_clean_end(my.notes); ++slot) {
        step<false>(launch, my, slot, first_slot);
      }
      if (slot >= end) break;
    }
  }

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    const Problem& problem = launch.params.problem;
    const int thread = ptx::thread_index();
    const Warp warp(thread);
    int index = Turns::take_work(launch, shared);
    const RowBlock block = row_block<Side::kKeys, kBlockK, kBlockQ>(problem, launch.slots_k, index);
    if (block.empty()) {
      Turns::finish(launch, index);
      return;
    }
    const uint32_t smem = ptx::shared_address(shared), notes = smem + Smem::kNotes;
    const BandMask mask = band_mask(problem, block.sequence);
    const BlockRange range =
        block.rows > 0 ? mask.query_blocks(block.row0, kBlockK, kBlockQ) : BlockRange{0, 0, 0, 0};
    load_keys<Shape>(launch, block, smem, thread);
    ptx::cp_async_wait<0>();
    __syncthreads();  // K and V have landed, for every thread
    const Places<Shape> at(smem, warp);
    V v{at.k_rows, Smem::kV - Smem::kK};
    v.load();
    State my{.at = at,
             .v = v,
             .stage = Stage<Shape>(smem + Smem::kStages, warp),
             .loader = Loader(smem + Smem::kStages, thread),
             .notes = notes};
    if constexpr (kConfig.v_in_registers) __syncthreads();  // V has been read: the stages are free
    if (thread == 0) {
      write_notes(notes, EdgeNotes{.diagonal = block.row0 - mask.highest + 1,
                                   .queries = static_cast<unsigned>(mask.highest - mask.lowest),
                                   .keys = block.rows});
    }
    Turns::start(index, TurnOrder::before(launch, block, index, kBlockK), notes);
    clear(my.dk);
    clear(my.dv);
    const int group = static_cast<int>(problem.group());
    for (int g = 0; g < group && !range.empty(); ++g) {
      walk(launch, my, block, range, block.head * group + g);
    }
    if constexpr (kDeterministic) {
      __syncthreads();  // dQ of the last block has been added to
      Turns::finish(launch, index);
    } else {
      index = ptx::block_index();
    }
    store_gradients<T, Smem>(launch, index, smem, my.dk, my.dv);
  }
};

}  // namespace flashtile
