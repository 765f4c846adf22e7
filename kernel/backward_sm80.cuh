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

// Blocks of queries that see keys [k0, k0 + block_k): [begin, full_begin) tested per element,
// [full_begin, end) see every key of the block.
struct QueryRange {
  int begin, full_begin, end;
};

FLASHTILE_DEVICE QueryRange query_blocks(bool causal, const Sequence& s, int k0, int block_q,
                                         int block_k) {
  const int shift = s.seqlen_q - s.seqlen_k;  // key j is seen from query j + shift on when causal
  QueryRange range;
  range.end = ceil_div(s.seqlen_q, block_q);
  range.begin = causal ? min(max(k0 + shift, 0) / block_q, range.end) : 0;
  range.full_begin = causal ? ceil_div(max(k0 + shift + block_k - 1, 0), block_q) : 0;
  range.full_begin = min(max(range.full_begin, range.begin), range.end);
  if (k0 + block_k > s.seqlen_k) range.full_begin = range.end;
  return range;
}

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
  static constexpr int kGradCols = kConfig.split_head_dim ? kHeadDim / kConfig.warps_q : kHeadDim;
  static constexpr int kHalfBytes =
      kQueries * kPanelRowBytes;  // from one warp's queries to the next's
  static constexpr int kExchange = Smem::kExchange - Smem::kScores;  // from dS^T to P^T
  using Scores = Accumulator<kKeys, kQueries>;  // S^T, P^T, dP^T, dS^T: [key, query]
  using Packed = PackedScores<kKeys, kQueries>;
  using Gradient = Accumulator<kKeys, kGradCols>;  // dK, dV: [key, head_dim]
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

  // This thread's part in copying Q, dO and the statistics of one block of queries.
  struct QueryLoader {
    const char *q, *dout, *statistics;  // first source of the next block
    uint32_t fill;                      // its place in the stage that the next block goes to
    int rows_left;                      // from the thread's first row to the end of the sequence
    bool copies_statistics;

    FLASHTILE_DEVICE QueryLoader(uint32_t stage, int thread)
        : fill(stage + QueryCopy::offset(thread)),
          copies_statistics(QueryCopy::offset(thread) < Smem::kStatisticsBytes) {}

    // Goes to row `row` of a head of the sequence; slot: its place in the workspace.
    FLASHTILE_DEVICE void start(const BackwardLaunch& launch, const Sequence& s, int row, int head,
                                int64_t slot) {
      const int thread = ptx::thread_index();
      q = QueryCopy::source(launch.params.q, s.batch, s.row_q + row, head, thread);
      dout = QueryCopy::source(launch.params.dout, s.batch, s.row_q + row, head, thread);
      statistics = reinterpret_cast<const char*>(launch.statistics + slot * Slot::kStatistics) +
                   QueryCopy::offset(thread);
      rows_left = s.seqlen_q - row - QueryCopy::row(thread);
    }

    FLASHTILE_DEVICE void load(const BackwardLaunch& launch) {
      QueryCopy::copy(fill, q, launch.q_pass_bytes, rows_left);
      QueryCopy::copy(fill + Smem::kDout, dout, launch.dout_pass_bytes, rows_left);
      if (copies_statistics) ptx::cp_async_16(fill + Smem::kStatistics, statistics);
      statistics += Smem::kStatisticsBytes;
      rows_left -= kBlockQ;
      ptx::cp_async_commit();
    }
  };

  // The lane's shared memory addresses of one stage; flip() moves them to the other stage.
  struct Stage {
    Cursor<QueryTile> rows;  // of the warp's queries: B of S^T = K Q^T (and dO, kDout further)
    Cursor<QueryTile> cols;  // the same queries, and the warp's columns: B of dK += dS^T Q
    uint32_t statistics;
    int step;

    FLASHTILE_DEVICE Stage(uint32_t stage, const Warp& warp)
        : rows(stage, Lanes::kColsFirst, warp.lane, warp.query * kQueries),
          cols(stage, Lanes::kRowsFirst, warp.lane, warp.query * kQueries,
               kConfig.split_head_dim ? warp.query * kGradCols / 8 : 0),
          statistics(stage + Smem::kStatistics + warp.query * kQueries * 12 + warp.lane % 4 * 16),
          step(-Smem::kStageBytes) {}

    FLASHTILE_DEVICE void flip(uint32_t& fill) {
      rows.base += step;
      cols.base += step;
      statistics += step;
      fill -= step;
      step = -step;
      ptx::hide(rows.base);
      ptx::hide(cols.base);
    }
    FLASHTILE_DEVICE float4 lse(int n16) const { return ptx::lds_f32x4(statistics + n16 * 192); }
    FLASHTILE_DEVICE float4 minus_delta(int n8) const {
      return ptx::lds_f32x4(statistics + n8 / 2 * 192 + 64 + n8 % 2 * 64);
    }
  };

  // Which of the lane's scores are hidden by the mask or by the end of the keys. Hidden
  // probabilities are written as -0, which exp2 never gives: they add nothing, and carry the
  // outcome to dS.
  struct EdgeTest {
    int diagonal;   // first query that sees the lane's first key, minus the lane's first query
    int keys_left;  // from the lane's first key to the end of the sequence

    FLASHTILE_DEVICE EdgeTest(bool causal, const RowBlock& block, int query_block,
                              const Warp& warp) {
      const int key = warp.key * kKeys + warp.lane / 4;
      const int query = query_block * kBlockQ + warp.query * kQueries + warp.lane % 4 * 2;
      const int shift = block.sequence.seqlen_q - block.sequence.seqlen_k;
      diagonal = (causal ? block.row0 + key + shift : -(1 << 30)) - query;
      keys_left = block.rows - key;
    }
    FLASHTILE_DEVICE void hide(Scores& p) const {
      FLASHTILE_UNROLL
      for (int m = 0; m < kKeys / 16; ++m) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * m + 8 * (i / 2);
          const int first = key < keys_left ? diagonal + key : INT32_MAX;
          FLASHTILE_UNROLL
          for (int n = 0; n < kQueries / 8; ++n) {
            p.d[m][n][i] = first <= 8 * n + i % 2 ? p.d[m][n][i] : -0.0f;
          }
        }
      }
    }
    static FLASHTILE_DEVICE bool hidden(float p) { return __float_as_int(p) < 0; }
  };

  // The lane's shared memory addresses that stay where they are.
  struct Places {
    Cursor<KeyTile> k_rows;     // the warp's keys: A of S^T = K Q^T (and V, further on)
    Cursor<KeyTile> k_cols;     // all keys, the warp's columns of dQ: B of dQ = dS K
    Cursor<ScoreTile> dq_rows;  // all keys, the warp's queries of dQ: A of dQ = dS K
    Cursor<ScoreTile> partner;  // the warp's keys, the partner's queries (P^T further on)
    uint32_t scores;            // the lane's first pair of its own scores

    FLASHTILE_DEVICE Places(uint32_t smem, const Warp& warp)
        : k_rows(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, warp.key * kKeys),
          k_cols(smem + Smem::kK, Lanes::kRowsFirst, warp.lane, 0, warp.dq_col * Dq::kCols / 8),
          dq_rows(smem + Smem::kScores, Lanes::kColsFirst, warp.lane, 0,
                  warp.dq_row * Dq::kRows / 8),
          partner(smem + Smem::kScores, Lanes::kRowsFirst, warp.lane, warp.key * kKeys,
                  (1 - warp.query) * kQueries / 8),
          scores(smem + Smem::kScores + warp.lane % 4 * 4 +
                 ScoreTile::offset(warp.key * kKeys + warp.lane / 4, warp.query * kQueries / 8)) {}
  };

  // gradient += scores b: over the warp's own queries, and where warps share the columns of the
  // gradient among them also over the partner's, whose scores are at `exchange`.
  static FLASHTILE_DEVICE void accumulate(Gradient& gradient, const Packed& scores,
                                          const Cursor<QueryTile>& b, int b_offset,
                                          const Cursor<ScoreTile>& exchange, int exchange_offset) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kQueries / 16; ++k) {
      product_AB_step<T>(gradient, scores.x[k], b, 16 * k, b_offset);
    }
    if constexpr (kConfig.split_head_dim) {
      Cursor<QueryTile> partner_b = b;
      partner_b.base += Warp(ptx::thread_index()).query == 0 ? kHalfBytes : -kHalfBytes;
      FLASHTILE_UNROLL
      for (int k = 0; k < kQueries / 16; ++k) {
        uint32_t a[kKeys / 16][4];
        FLASHTILE_UNROLL
        for (int m = 0; m < kKeys / 16; ++m) {
          ptx::ldmatrix_x4(a[m], exchange.at(16 * m, k, exchange_offset));
        }
        product_AB_step<T>(gradient, a, partner_b, 16 * k, b_offset);
      }
    }
  }

  // A barrier of the warps that have the same keys.
  static FLASHTILE_DEVICE void share_scores() {
    ptx::named_barrier_sync(1 + Warp(ptx::thread_index()).key, 32 * kConfig.warps_q);
  }

  // dQ of the whole block of queries, the warp's rows and columns of it.
  static FLASHTILE_DEVICE void add_dq(float* dq, const Cursor<ScoreTile>& ds,
                                      const Cursor<KeyTile>& k_cols) {
    Accumulator<Dq::kRows, Dq::kCols> sum;
    clear(sum);
    FLASHTILE_UNROLL
    for (int k = 0; k < kBlockK / 16; ++k) {
      uint32_t a[Dq::kRows / 16][4];
      FLASHTILE_UNROLL
      for (int m = 0; m < Dq::kRows / 16; ++m) ptx::ldmatrix_x4_trans(a[m], ds.at(16 * k, m));
      product_AB_step<T>(sum, a, k_cols, 16 * k, 0);
    }
    FLASHTILE_UNROLL
    for (int m = 0; m < Dq::kRows / 16; ++m) {
      FLASHTILE_UNROLL
      for (int n = 0; n < Dq::kCols / 8; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i)
          ptx::red_add(dq + ((m * (Dq::kCols / 8) + n) * 4 + i) * kThreads, sum.d[m][n][i]);
      }
    }
  }

  static FLASHTILE_DEVICE int work_index(const Params& launch, char* shared) {
    if constexpr (!kDeterministic) return ptx::block_index();
    return take_ticket(launch.turns + launch.params.problem.num_heads * launch.slots_q, shared);
  }

  static FLASHTILE_DEVICE void load_keys(const BackwardParams& p, const RowBlock& block,
                                         uint32_t smem, int thread) {
    const Sequence& s = block.sequence;
    const uint32_t offset = KeyCopy::offset(thread);
    const int64_t row0 = s.row_k + block.row0;
    const char* k = KeyCopy::source(p.k, s.batch, row0, block.head, thread);
    const char* v = KeyCopy::source(p.v, s.batch, row0, block.head, thread);
    const int rows_left = block.rows - KeyCopy::row(thread);
    KeyCopy::copy(smem + Smem::kK + offset, k, 2 * KeyCopy::kRowsPerPass * p.k.stride_seq,
                  rows_left);
    KeyCopy::copy(smem + Smem::kV + offset, v, 2 * KeyCopy::kRowsPerPass * p.v.stride_seq,
                  rows_left);
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
    const Places at(smem, warp);

    load_keys(p, block, smem, thread);
    using V = std::conditional_t<kConfig.v_in_registers, RegisterRows<KeyTile, kKeys>,
                                 SharedRows<KeyTile>>;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K and V have landed, for every thread
    const V v(at.k_rows, Smem::kV - Smem::kK);
    if constexpr (kConfig.v_in_registers) __syncthreads();  // V has been read: the stages are free

    Gradient dk, dv;
    clear(dk);
    clear(dv);
    Stage stage(smem + Smem::kStages + Smem::kStageBytes, warp);
    QueryLoader loader(smem + Smem::kStages, thread);
    std::conditional_t<kDeterministic, DqTurns, NoTurns> turns(block.row0 / kBlockK);
    const bool causal = p.problem.is_causal();
    const QueryRange range = query_blocks(causal, s, block.row0, kBlockQ, kBlockK);
    const int group = static_cast<int>(p.problem.num_heads / p.problem.num_heads_kv);

    for (int g = 0; g < group && range.begin < range.end; ++g) {
      const int head = block.head * group + g;
      const int64_t slot = head * launch.slots_q + block.first_slot_q + range.begin;
      loader.start(launch, s, range.begin * kBlockQ, head, slot);
      loader.load(launch);  // into the stage that nobody reads: see step
      float* dq = launch.dq_accumulator + slot * Slot::kDq + thread;

      turns.start(launch, slot);
      EdgeTest test(causal, block, range.begin, warp);
      int i = range.begin;  // block of queries
      auto step = [&](auto edge) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // block i has landed; nobody reads block i - 1 or its dS any more
        if (i > range.begin) turns.pass();  // ... nor adds to its dQ
        stage.flip(loader.fill);
        if (i + 1 < range.end) loader.load(launch);

        Scores scores;
        product_ABt<T>(scores, SharedRows<KeyTile>(at.k_rows, 0), stage.rows, 0,
                       [](int) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); });  // S^T = K Q^T
        probabilities(scores, stage, launch.scale_log2);
        if constexpr (edge.value) {
          test.hide(scores);
          test.diagonal -= kBlockQ;
        }
        Packed packed;
        packed.template pack<T>(scores);
        if constexpr (kConfig.split_head_dim) {
          packed.store(at.scores + kExchange);
          share_scores();  // P^T of the warp's keys is complete
        }
        accumulate(dv, packed, stage.cols, Smem::kDout, at.partner, kExchange);

        Scores ds;
        product_ABt<T>(ds, v, stage.rows, Smem::kDout, [&](int n) {
          return stage.minus_delta(n);
        });  // dP^T - delta = V dO^T - delta
        multiply<edge.value>(ds, scores);
        packed.template pack<T>(ds);
        packed.store(at.scores);
        turns.wait();
        __syncthreads();  // dS of block i is complete
        accumulate(dk, packed, stage.cols, 0, at.partner, 0);
        add_dq(dq, at.dq_rows, at.k_cols);
        turns.added();
        dq += Slot::kDq;
      };
      for (; i < range.full_begin; ++i) step(std::true_type());
      for (; i < range.end; ++i) step(std::false_type());
      if constexpr (kDeterministic) {
        __syncthreads();  // dQ of the last block has been added to
        turns.pass();
      }
    }
    if constexpr (!kDeterministic) index = ptx::block_index();
    store_gradients<T, kHeadDim, kMemory>(launch, index, smem, dk, dv);
  }
};

}  // namespace flashtile
