// Main launch of the backward (FlashAttention-2, Algorithm 2): one block of keys against all
// queries that see it, with cp.async, ldmatrix and mma.sync m16n8k16.
//
// Scores are computed transposed, S^T = K Q^T: their accumulators, rounded to 16 bits, already are
// the A operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, to be the A
// operand of dQ = dS K, which is added to an fp32 buffer in global memory. dK and dV stay in
// registers over all query heads that share the keys. kernel/README.md has the pictures.
#pragma once

#include <type_traits>

#include "backward_sm80_store.cuh"
#include "backward_sm80_tile.cuh"
#include "backward_turns.cuh"

namespace flashtile {

template <class T, int kHeadDim, Memory kMemory, bool kDeterministic>
struct BackwardSm80 {
  using Params = BackwardLaunch;
  using Smem = BackwardSmem<kHeadDim, kMemory>;
  using Dq = DqOrder<kHeadDim, kMemory>;
  using QueryTile = typename Smem::QueryTile;
  using KeyTile = typename Smem::KeyTile;
  using ScoreTile = typename Smem::ScoreTile;
  static constexpr BackwardConfig kConfig = Smem::kConfig;
  static constexpr int kThreads = 32 * kConfig.warps();
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = Smem::kBytes;
  static constexpr int kBlockQ = kConfig.block_q;
  static constexpr int kBlockK = kConfig.block_k;
  static constexpr int kKeys = kBlockK / kConfig.warps_k;     // of one warp
  static constexpr int kQueries = kBlockQ / kConfig.warps_q;  // of one warp's scores
  using GradColumns = ColumnSplit<kHeadDim, kConfig.split_head_dim ? kConfig.warps_q : 1>;
  using DqColumns = typename Dq::Columns;
  static constexpr bool kPairs = kConfig.warps_q == 2;  // of warps that exchange scores
  static constexpr int kHalfBytes =
      kQueries * kPanelRowBytes;  // from one warp's queries to the next's
  static constexpr int kExchange = Smem::kExchange - Smem::kScores;  // from dS^T to P^T
  using Scores = Accumulator<kKeys, kQueries>;  // S^T, P^T, dP^T, dS^T: [key, query]
  using Packed = PackedScores<kKeys, kQueries>;
  using Gradient = Accumulator<kKeys, GradColumns::kCols>;  // dK, dV: [key, head_dim]
  using QueryColumns = Cursor<QueryTile, kConfig.split_head_dim ? kConfig.warps_q : 1>;
  using KeyColumns = Cursor<KeyTile, Dq::kWarpCols>;
  using QueryCopy = RowCopy<QueryTile, kThreads>;
  using KeyCopy = RowCopy<KeyTile, kThreads>;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;
  using Turns = std::conditional_t<kDeterministic, DqTurns<kBlockQ, kBlockK>, NoTurns>;

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

  // The rows of a block of queries, for those who copy them.
  struct QueryRows {
    bool are_plain;  // all exist, fill the tile and are 16-byte aligned
    int count;       // that exist; none past the last block

    // Of a block that is known to be whole.
    static FLASHTILE_DEVICE QueryRows whole(const Params& launch) { return {launch.plain, kBlockQ}; }
    static FLASHTILE_DEVICE QueryRows any(const Params& launch, int block, uint32_t notes_address) {
      const QueryNotes notes = read_notes<QueryNotes>(notes_address);
      const int count = block < notes.end ? notes.seqlen_q - block * kBlockQ : 0;
      return {launch.plain && count >= kBlockQ, count};
    }
  };

  // This thread's part in copying Q, dO and the statistics of one block of queries.
  struct QueryLoader {
    const char *q, *dout;  // first source of the next block
    uint32_t fill;         // its place in the stage that the next block goes to
    uint32_t fill_dout;    // the same of dO, where it has one place only

    FLASHTILE_DEVICE QueryLoader(uint32_t stages, int thread)
        : fill(stages + QueryCopy::offset(thread)), fill_dout(fill + Smem::kDout) {}

    // Goes to row `row` of a head of the sequence.
    FLASHTILE_DEVICE void start(const Params& launch, const Sequence& s, int row, int head) {
      const int thread = ptx::thread_index();
      q = QueryCopy::source(launch.params.q, s.batch, s.row_q + row, head, thread);
      dout = QueryCopy::source(launch.params.dout, s.batch, s.row_q + row, head, thread);
    }

    // Q, dO and the statistics of the next block, in one burst; `slot`: its place in the workspace.
    FLASHTILE_DEVICE void load(const Params& launch, const QueryRows& rows, int slot) {
      if (rows.are_plain) {
        QueryCopy::copy(fill, q, launch.q_pass_bytes);
        QueryCopy::copy(dout_place(), dout, launch.dout_pass_bytes);
        copy_statistics(launch, slot);
      } else if (rows.count > 0) {
        QueryCopy::copy_any(fill, q, launch.q_pass_bytes, rows.count, launch.q);
        QueryCopy::copy_any(dout_place(), dout, launch.dout_pass_bytes, rows.count, launch.dout);
        copy_statistics(launch, slot);
      }
      ptx::cp_async_commit();
    }
    // Only Q; only dO and the statistics.
    FLASHTILE_DEVICE void load_q(const Params& launch, const QueryRows& rows) {
      if (rows.are_plain) {
        QueryCopy::copy(fill, q, launch.q_pass_bytes);
      } else if (rows.count > 0) {
        QueryCopy::copy_any(fill, q, launch.q_pass_bytes, rows.count, launch.q);
      }
      ptx::cp_async_commit();
    }
    FLASHTILE_DEVICE void load_dout(const Params& launch, const QueryRows& rows, int slot) {
      if (rows.are_plain) {
        QueryCopy::copy(dout_place(), dout, launch.dout_pass_bytes);
        copy_statistics(launch, slot);
      } else if (rows.count > 0) {
        QueryCopy::copy_any(dout_place(), dout, launch.dout_pass_bytes, rows.count, launch.dout);
        copy_statistics(launch, slot);
      }
      ptx::cp_async_commit();
    }

   private:
    FLASHTILE_DEVICE uint32_t dout_place() const {
      return Smem::kTogether ? fill + Smem::kDout : fill_dout;
    }
    // The first rows of a tile's first panel lie in as many bytes as the statistics: the threads
    // that copy these rows copy the statistics, too, and what leads to their chunk there leads to
    // their part. (Rows of four chunks leave half of the bytes out; there, threads go by number.)
    static constexpr bool kSameOffset = QueryCopy::kLanes >= 8;
    static FLASHTILE_DEVICE bool copies_statistics(unsigned thread) {
      constexpr unsigned kRows = Smem::kStatisticsBytes / kPanelRowBytes;
      if constexpr (!kSameOffset) return thread < Smem::kStatisticsBytes / kChunkBytes;
      return thread < kRows * QueryCopy::kLanes && thread % QueryCopy::kLanes < kPanelCols / 8;
    }
    FLASHTILE_DEVICE void copy_statistics(const Params& launch, int slot) const {
      const int thread = ptx::thread_index();
      if (!copies_statistics(thread)) return;
      uint32_t to = dout_place() + (Smem::kStatistics - Smem::kDout);
      uint32_t offset = to % Smem::kStatisticsPlace;  // tiles and statistics start at multiples
      if constexpr (!kSameOffset) {
        offset = thread * kChunkBytes;
        to += offset - QueryCopy::offset(thread);
      }
      ptx::cp_async_16(
          to, reinterpret_cast<const char*>(slot_statistics(launch, slot)) + offset);
    }
  };

  // The lane's shared memory addresses of one stage; flip() moves them to the other stage.
  struct Stage {
    Cursor<QueryTile> rows;  // of the warp's queries: B of S^T = K Q^T (and dO, further on)
    QueryColumns cols;       // queries, the warp's columns: B of dK += dS^T Q (and dO, further on)
    uint32_t statistics;
    int step;

    FLASHTILE_DEVICE Stage(uint32_t stages, const Warp& warp)
        : rows(first(stages), Lanes::kColsFirst, warp.lane, warp.query * kQueries),
          cols(first(stages), Lanes::kRowsFirst, warp.lane, kPairs ? warp.query * kQueries : 0,
               kConfig.split_head_dim ? GradColumns::first_chunk(warp.query) : 0),
          statistics((Smem::kTogether ? first(stages) : stages) + Smem::kStatistics +
                     warp.query * kQueries * 12 + warp.lane % 4 * 16),
          step(-Smem::kStageBytes) {}

    FLASHTILE_DEVICE void flip(uint32_t& fill) {
      if constexpr (kConfig.stages_q == 2) {
        rows.base += step;
        cols.base += step;
        if constexpr (Smem::kTogether) statistics += step;
        fill -= step;
        step = -step;
      }
      ptx::hide(rows.base);
      ptx::hide(cols.base);
    }
    // Where only Q has two places: the same address as in Q's first stage. kDout leads on from it.
    template <class Address>
    FLASHTILE_DEVICE Address of_dout(Address address) const {
      if constexpr (!Smem::kTogether) address.base -= (Smem::kStageBytes - step) / 2;
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
  struct EdgeTest {
    static FLASHTILE_DEVICE void hide(Scores& p, int query_block, uint32_t notes_address) {
      const EdgeNotes notes = read_notes<EdgeNotes>(notes_address);
      const Warp warp(ptx::thread_index());
      const int lane_key = warp.key * kKeys + warp.lane / 4;
      const int query = query_block * kBlockQ + warp.query * kQueries + warp.lane % 4 * 2;
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
  struct Places {
    Cursor<KeyTile> k_rows;     // the warp's keys: A of S^T = K Q^T (and V, further on)
    KeyColumns k_cols;          // all keys, the warp's columns of dQ: B of dQ = dS K
    Cursor<ScoreTile> dq_rows;  // all keys, the warp's queries of dQ: A of dQ = dS K
    Cursor<ScoreTile> partner;  // the warp's keys, the partner's (all) queries (P^T further on)
    uint32_t scores;            // the lane's first pair of its own scores

    FLASHTILE_DEVICE Places(uint32_t smem, const Warp& warp)
        : k_rows(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, warp.key * kKeys),
          k_cols(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, 0,
                 DqColumns::first_chunk(warp.dq_col)),
          dq_rows(smem + Smem::kScores, Lanes::kColsFirst, warp.lane, 0,
                  warp.dq_row * Dq::kRows / 8),
          partner(smem + Smem::kScores, Lanes::kRowsFirst, warp.lane, warp.key * kKeys,
                  kPairs ? (1 - warp.query) * kQueries / 8 : 0),
          scores(smem + Smem::kScores + warp.lane % 4 * 4 +
                 ScoreTile::offset(warp.key * kKeys + warp.lane / 4, warp.query * kQueries / 8)) {}

    // Keeps the compiler from computing all the addresses that follow from this one before the loop.
    // (It does no good where a warp has all of its keys' queries to itself.)
    FLASHTILE_DEVICE void hide() {
      if constexpr (kConfig.split_head_dim) ptx::hide(k_rows.base);
    }
  };

  // gradient += scores b. Where warps share the columns of the gradient among them, the scores of
  // all their queries: of two, a warp has its own in registers and reads its partner's at
  // `exchange`; of more, it reads all there.
  static FLASHTILE_DEVICE void accumulate(Gradient& gradient, const Packed& scores,
                                          const QueryColumns& b, int b_offset,
                                          const Cursor<ScoreTile>& exchange, int exchange_offset) {
    constexpr bool kExchanged = kConfig.split_head_dim;
    if constexpr (kPairs || !kExchanged) {
      FLASHTILE_UNROLL
      for (int k = 0; k < kQueries / 16; ++k) {
        product_AB_step<T>(gradient, scores.x[k], b, 16 * k, b_offset);
      }
    }
    if constexpr (kExchanged) {
      QueryColumns other_b = b;
      if constexpr (kPairs) {
        other_b.base += Warp(ptx::thread_index()).query == 0 ? kHalfBytes : -kHalfBytes;
      }
      FLASHTILE_UNROLL
      for (int k = 0; k < (kPairs ? kQueries : kBlockQ) / 16; ++k) {
        uint32_t a[kKeys / 16][4];
        FLASHTILE_UNROLL
        for (int m = 0; m < kKeys / 16; ++m) {
          ptx::ldmatrix_x4(a[m], exchange.at(16 * m, k, exchange_offset));
        }
        product_AB_step<T>(gradient, a, other_b, 16 * k, b_offset);
      }
    }
  }

  // A barrier of the warps that have the same keys.
  static FLASHTILE_DEVICE void share_scores() {
    ptx::named_barrier_sync(1 + Warp(ptx::thread_index()).key, 32 * kConfig.warps_q);
  }

  // dQ of the whole block of queries, the warp's rows and columns of it, some columns at a time.
  static FLASHTILE_DEVICE void add_dq(float* dq, const Cursor<ScoreTile>& ds,
                                      const KeyColumns& k_cols) {
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
        product_AB_step<T>(sum, a, k_cols, 16 * k, pass * kPanels * KeyTile::kPanelBytes);
      }
      FLASHTILE_UNROLL
      for (int m = 0; m < Dq::kRows / 16; ++m) {
        FLASHTILE_UNROLL
        for (int n = 0; n < kCols / 8; ++n) {
          const int block = m * (Dq::kCols / 8) + pass * (kCols / 8) + n;
          FLASHTILE_UNROLL
          for (int i = 0; i < 4; ++i)
            ptx::red_add(dq + (block * 4 + i) * kThreads, sum.d[m][n][i]);
        }
      }
    }
  }

  // A slot's parts of the workspace: a multiplication instead of a pointer kept in registers.
  static FLASHTILE_DEVICE const float* slot_statistics(const Params& launch, int slot) {
    return launch.statistics + static_cast<int64_t>(slot) * Slot::kStatistics;
  }
  static FLASHTILE_DEVICE float* slot_dq(const Params& launch, int slot) {
    return launch.dq_accumulator + static_cast<int64_t>(slot) * Slot::kDq;
  }

  // Whether some query of these blocks has scores so large that exp2(score - lse) may be anything
  // (see BackwardDelta). All threads ask.
  static FLASHTILE_DEVICE bool has_huge_scores(const Params& launch, int slot, int blocks) {
    bool huge = false;
    for (int i = ptx::thread_index(); i < blocks; i += kThreads) {
      huge |= slot_statistics(launch, slot + i)[Slot::kHuge] != 0.0f;
    }
    return __syncthreads_or(huge) != 0;
  }

  static FLASHTILE_DEVICE int work_index(const Params& launch, char* shared) {
    if constexpr (!kDeterministic) return ptx::block_index();
    return take_ticket(launch.turns + launch.params.problem.num_heads * launch.slots_q, shared);
  }

  static FLASHTILE_DEVICE void load_keys(const Params& launch, const RowBlock& block, uint32_t smem,
                                         int thread) {
    const BackwardParams& p = launch.params;
    const Sequence& s = block.sequence;
    const uint32_t offset = KeyCopy::offset(thread);
    const int64_t row0 = s.row_k + block.row0;
    const char* k = KeyCopy::source(p.k, s.batch, row0, block.head, thread);
    const char* v = KeyCopy::source(p.v, s.batch, row0, block.head, thread);
    const int64_t k_pass = 2 * KeyCopy::kRowsPerPass * p.k.stride_seq;
    const int64_t v_pass = 2 * KeyCopy::kRowsPerPass * p.v.stride_seq;
    if (launch.plain && block.rows >= kBlockK) {
      KeyCopy::copy(smem + Smem::kK + offset, k, k_pass);
      KeyCopy::copy(smem + Smem::kV + offset, v, v_pass);
    } else {
      KeyCopy::copy_any(smem + Smem::kK + offset, k, k_pass, block.rows, launch.k);
      KeyCopy::copy_any(smem + Smem::kV + offset, v, v_pass, block.rows, launch.v);
    }
    ptx::cp_async_commit();
  }

  // S^T -> P^T = exp2(S^T scale_log2 - lse)
  static FLASHTILE_DEVICE void probabilities(Scores& s, const Stage& stage, float scale_log2) {
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

  // dP^T - delta -> dS^T. A selection where hidden: what stands there may be infinite.
  template <bool kEdge>
  static FLASHTILE_DEVICE void multiply(Scores& ds, const Scores& p) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kKeys / 16; ++m) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kQueries / 8; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& x = ds.d[m][n][i];
          x *= p.d[m][n][i];
          if (kEdge && EdgeTest::hidden(p.d[m][n][i])) x = 0.0f;
        }
      }
    }
  }

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    const BackwardParams& p = launch.params;
    const int thread = ptx::thread_index();
    const Warp warp(thread);
    int index = work_index(launch, shared);
    const RowBlock block =
        row_block<Rows::kKeys, kBlockK, kBlockQ>(p.problem, launch.slots_k, index);
    if (block.empty()) return;
    const Sequence& s = block.sequence;
    const uint32_t smem = ptx::shared_address(shared);
    Places at(smem, warp);

    const BandMask mask(p.problem.band, s.seqlen_q, s.seqlen_k);
    const BlockRange range = block.rows > 0 ? mask.query_blocks(block.row0, kBlockK, kBlockQ)
                                            : BlockRange{0, 0, 0, 0};
    const uint32_t notes = smem + Smem::kNotes;
    load_keys(launch, block, smem, thread);
    using V = std::conditional_t<kConfig.v_in_registers, RegisterRows<KeyTile, kKeys>,
                                 SharedRows<KeyTile>>;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K and V have landed, for every thread
    const V v(at.k_rows, Smem::kV - Smem::kK);
    if constexpr (kConfig.v_in_registers) __syncthreads();  // V has been read: the stages are free
    if (thread == 0) {
      write_notes(notes, EdgeNotes{.diagonal = block.row0 - mask.highest + 1,
                                   .queries = static_cast<unsigned>(mask.highest - mask.lowest),
                                   .keys = block.rows});
      write_notes(notes, QueryNotes{.seqlen_q = s.seqlen_q, .end = range.end, .clean_end = 0});
    }
    __syncthreads();  // the notes are there

    Gradient dk, dv;
    clear(dk);
    clear(dv);
    Stage stage(smem + Smem::kStages, warp);
    QueryLoader loader(smem + Smem::kStages, thread);
    const int group = static_cast<int>(p.problem.num_heads / p.problem.num_heads_kv);

    for (int g = 0; g < group && !range.empty(); ++g) {
      const int head = block.head * group + g;
      const int first_slot = static_cast<int>(head * launch.slots_q + block.first_slot_q);
      int slot = first_slot + range.begin;  // of the block of queries
      // Clean blocks are those that are seen whole and followed by a whole one.
      const bool huge = has_huge_scores(launch, slot, range.end - range.begin);
      const int whole_end = min(range.end, s.seqlen_q / kBlockQ);
      if (thread == 0) {
        const int clean_end = huge ? slot : first_slot + min(range.full_end, whole_end - 1);
        write_notes(notes, QueryNotes{s.seqlen_q, range.end, clean_end});
      }
      __syncthreads();  // everybody may read it
      Turns::start({.key_block = block.row0 / kBlockK,
                    .first_visited = slot,
                    .to_first_key = mask.lowest - first_slot * unsigned{kBlockQ}},
                   notes);
      loader.start(launch, s, range.begin * kBlockQ, head);
      // Into the stage that nobody reads: see step.
      loader.load(launch, QueryRows::any(launch, range.begin, notes), slot);

      // kEdge: some scores may be hidden, and the next block may be ragged or not exist.
      auto step = [&]<bool kEdge>() {
        ptx::cp_async_wait<0>();
        __syncthreads();  // the block has landed; nobody reads the one before or its dS any more
        Turns::pass_previous(launch, slot, notes);  // ... nor adds to its dQ
        stage.flip(loader.fill);
        at.hide();
        const QueryRows next = kEdge ? QueryRows::any(launch, slot + 1 - first_slot, notes)
                                     : QueryRows::whole(launch);
        if constexpr (kConfig.stages_dout == 2) {
          loader.load(launch, next, slot + 1);
        } else if constexpr (kConfig.stages_q == 2) {
          loader.load_q(launch, next);
        }

        Scores scores;
        product_ABt<T>(scores, SharedRows<KeyTile>(at.k_rows, 0), stage.rows, 0,
                       [](int) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); });  // S^T = K Q^T
        probabilities(scores, stage, launch.scale_log2);
        if constexpr (kEdge) EdgeTest::hide(scores, slot - first_slot, notes);
        Packed packed;
        packed.template pack<T>(scores);
        if constexpr (kConfig.split_head_dim) {
          packed.store(at.scores + kExchange);
          share_scores();  // P^T of the warp's keys is complete
        }
        accumulate(dv, packed, stage.of_dout(stage.cols), Smem::kDout, at.partner, kExchange);

        Scores ds;
        product_ABt<T>(ds, v, stage.of_dout(stage.rows), Smem::kDout, [&](int n) {
          return stage.minus_delta(n);
        });  // dP^T - delta = V dO^T - delta
        multiply<kEdge>(ds, scores);
        packed.template pack<T>(ds);
        if constexpr (kConfig.one_exchange) share_scores();  // P^T of the warp's keys has been read
        packed.store(at.scores);
        Turns::wait(launch, slot, notes);
        __syncthreads();  // dS of the block is complete; nobody reads its dO any more
        if constexpr (kConfig.stages_dout == 1) loader.load_dout(launch, next, slot + 1);
        accumulate(dk, packed, stage.cols, 0, at.partner, 0);
        if constexpr (kConfig.stages_q == 1) {
          __syncthreads();  // nobody reads Q of the block any more
          loader.load_q(launch, next);
        }
        add_dq(slot_dq(launch, slot) + ptx::thread_index(), at.dq_rows, at.k_cols);
        ++slot;
      };
      const int edge_end = first_slot + range.full_begin, end = first_slot + range.end;
      for (int until = edge_end;; until = end) {
        while (slot < until) step.template operator()<true>();
        while (slot < QueryNotes::read_clean_end(notes)) step.template operator()<false>();
        if (slot >= end) break;
      }
      if constexpr (kDeterministic) {
        __syncthreads();  // dQ of the last block has been added to
        Turns::pass(launch, end - 1);
      }
    }
    if constexpr (!kDeterministic) index = ptx::block_index();
    store_gradients<T, kHeadDim, kMemory>(launch, index, smem, dk, dv);
  }
};

}  // namespace flashtile
