// Gradients of biases and of ALiBi's slopes, after the main launch: sums of the logits' gradients
// dS, which are computed again, P (dP - delta) from S = Q K^T and dP = dO V^T.
//
// One block for every 64 x 64 tile of the gradient, which adds up, in order, over everything that
// the tensor repeats: batch, heads, tiles of queries and of keys. So the bits do not depend on
// which block comes first, nothing is added in memory, and the main launch stays as it is.
#pragma once

#include "backward/layout.cuh"
#include "backward/tile.cuh"
#include "tile/band_edges.cuh"
#include "tile/finish_scores.cuh"
#include "tile/load_sm80.cuh"
#include "tile/product_sm80.cuh"

namespace flashtile {

enum class ScoreGradient { kBias, kSlopes };

struct ScoreGradientParams {
  ModifiedScores::WithScores<BackwardLaunch> launch;
  ScoreView to;
  ScoreGradient kind;
  int tiles_q, tiles_k;  // of the gradient, 1 where it adds up over the dimension
};

// Order: of the workspace (BackwardSlot).
template <class T, int kHeadDim, class Order>
struct BackwardScoreGradients {
  using Params = ScoreGradientParams;
  static constexpr int kBlock = 64;  // queries, and keys
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kRows = kBlock / kWarps;
  static constexpr int kBlockQ = Order::kBlockQ;
  using Tile = SmemTile<kBlock, kHeadDim>;
  using Loader = TileLoader<Tile, kThreads>;
  using Rows = LaneAddress<Tile>;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;
  using Block = Accumulator<kRows, kBlock>;

  // Shared memory: Q, then dO; K, then V; the notes; a number for every warp.
  static constexpr int kNotes = 2 * Tile::kBytes;
  static constexpr int kSums = kNotes + ScoreNotes::kBytes;
  static constexpr int kSharedBytes = kSums + 16 * kBlock;

  // Which sequences, heads and tiles a block adds up: from `first` on, `count`.
  struct Range {
    int first, end;
    FLASHTILE_DEVICE Range(bool adds_up, int own, int all)
        : first(adds_up ? 0 : own), end(adds_up ? all : own + 1) {}
  };

  static FLASHTILE_DEVICE void run(const Params& p, char* shared) {
    const Problem& problem = p.launch.params.problem;
    const int heads = static_cast<int>(problem.num_heads);
    int index = ptx::block_index();
    const int tile_k = index % p.tiles_k;
    index /= p.tiles_k;
    const int tile_q = index % p.tiles_q;
    index /= p.tiles_q;
    const int own_head = p.to.stride_head == 0 ? 0 : index % heads;
    const int own_batch = p.to.stride_head == 0 ? index : index / heads;
    const Range batches(p.to.stride_batch == 0, own_batch, static_cast<int>(problem.batch));
    const Range all_heads(p.to.stride_head == 0, own_head, heads);
    const uint32_t smem = ptx::shared_address(shared);
    Block sum;
    clear(sum);
    FLASHTILE_ROLL
    for (int b = batches.first; b < batches.end; ++b) {
      const Sequence sequence = sequence_of(problem, b);
      FLASHTILE_ROLL
      for (int head = all_heads.first; head < all_heads.end; ++head)
        add_head(p, smem, sequence, head, tile_q, tile_k, sum);
    }
    store(p, smem, sum, {own_batch, own_head, tile_q * kBlock, tile_k * kBlock});
  }

 private:
  static FLASHTILE_DEVICE int lane() { return ptx::thread_index() % 32; }
  static FLASHTILE_DEVICE int warp_row() { return ptx::thread_index() / 32 * kRows; }
  static FLASHTILE_DEVICE bool adds_queries(const Params& p) { return p.to.stride_q == 0; }
  static FLASHTILE_DEVICE bool adds_keys(const Params& p) { return p.to.stride_k == 0; }

  // Of one head of a sequence.
  static FLASHTILE_DEVICE void add_head(const Params& p, uint32_t smem, const Sequence& sequence,
                                        int head, int tile_q, int tile_k, Block& sum) {
    const Range queries(adds_queries(p), tile_q, ceil_div(sequence.seqlen_q, kBlock));
    FLASHTILE_ROLL
    for (int i = queries.first; i < queries.end; ++i) {
      const RowBlock work = block_from<Side::kQueries>(i * kBlock, head, sequence);
      if (work.rows <= 0) break;
      const BlockRange seen = key_blocks(p.launch.params.problem, work, kBlock, kBlock);
      const Range keys(adds_keys(p), tile_k, seen.end);
      FLASHTILE_ROLL
      for (int j = max(keys.first, seen.begin); j < min(keys.end, seen.end); ++j)
        add_block(p, smem, work, seen, j, sum);
    }
  }

  static FLASHTILE_DEVICE void load(uint32_t tile, const View& view, const RowFormat& format,
                                    const RowBlock& work, int64_t row, int head, int rows) {
    const typename Loader::Target target(tile, ptx::thread_index());
    Loader loader(row_address(view, work.sequence, row + kBlock, head), view.stride_seq,
                  ptx::thread_index());
    loader.load(target, format, rows);
  }

  // S or dP of the tiles that `load_both` brings.
  template <class Load>
  static FLASHTILE_DEVICE void product(uint32_t smem, const Load& load_both, Block& s) {
    __syncthreads();  // all warps are done with the tiles before
    load_both();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    mma_ABt<T>(s, SharedOperand<Rows, kRows>{Rows(smem, Lanes::kRowsFirst, lane(), warp_row())},
               Rows(smem + Tile::kBytes, Lanes::kColsFirst, lane()));
  }

  // sum += what a block of queries and block `j` of keys contribute.
  static FLASHTILE_DEVICE void add_block(const Params& p, uint32_t smem, const RowBlock& work,
                                         const BlockRange& seen, int j, Block& sum) {
    const BackwardParams& params = p.launch.params;
    const Sequence& s = work.sequence;
    const int key = j * kBlock, kv_head = key_head(params.problem, work.head);
    const int64_t row_q = s.row_q + work.row0, row_k = s.row_k + key;
    Block prob, ds;
    product(
        smem,
        [&] {
          load(smem, params.q, p.launch.q, work, row_q, work.head, work.rows);
          load(smem + Tile::kBytes, params.k, p.launch.k, work, row_k, kv_head, s.seqlen_k - key);
          if (ptx::thread_index() == 0)
            ModifiedScores::note(params.problem, p.launch.scores, work, smem + kNotes);
        },
        prob);
    const ScoreTile at = {smem + kNotes, warp_row()};
    const Statistics statistics(p, work, at);
    ModifiedScores::to_logits(prob, p.launch.scores, at, key);
    const BandEdges edges(band_mask(params.problem, s), work.row0 + warp_row(), lane());
    edges.mask(prob, seen, j);
    product(
        smem,
        [&] {
          load(smem, params.dout, p.launch.dout, work, row_q, work.head, work.rows);
          load(smem + Tile::kBytes, params.v, p.launch.v, work, row_k, kv_head, s.seqlen_k - key);
        },
        ds);
    const Dropout& dropout = p.launch.scores.of.dropout;
    if (dropout.exists()) {
      FLASHTILE_UNROLL
      for (int step = 0; step < kBlock / 16; ++step)
        ModifiedScores::drop(ds, step, dropout, at, key);
    }
    const int distance = at.place().distance - key + at.row + lane() / 4 - lane() % 4 * 2;
    for_each(ds, [&](float& x, int m, int n, int i) {
      const float logit = prob.d[m][n][i];
      const float weight =
          ptx::min_nan(ptx::ex2(logit * p.launch.scale_log2 - statistics.lse[m][i / 2]), 1.0f) *
          p.launch.scores.kept_factor;
      // A selection: dP of a hidden key may be infinite, the logit of a row that is not in use NaN.
      const bool counts = logit != negative_infinity() && statistics.lse[m][i / 2] != INFINITY;
      x = counts ? weight * (x + statistics.minus_delta[m][i / 2]) : 0.0f;
      if (p.kind == ScoreGradient::kSlopes) {
        const int d = distance + 16 * m + 8 * (i / 2) - (8 * n + i % 2);
        x *= -fabsf(static_cast<float>(d));
      }
      sum.d[m][n][i] += x;
    });
  }

  // Of the lane's rows; those that are not in use have lse = +inf.
  struct Statistics {
    float lse[kRows / 16][2], minus_delta[kRows / 16][2];

    FLASHTILE_DEVICE Statistics(const Params& p, const RowBlock& work, const ScoreTile& at) {
      const Problem& problem = p.launch.params.problem;
      const Sequence& s = work.sequence;
      const int64_t first = problem.is_varlen()
                                ? first_slot(s.row_q, s.index, kBlockQ)
                                : s.batch * ceil_div(static_cast<int>(problem.seqlen_q), kBlockQ);
      for_each_row<kRows>([&](int m, int half) {
        const int query = work.row0 + at.row + accumulator_row(lane(), m, 2 * half);
        lse[m][half] = INFINITY;
        minus_delta[m][half] = 0.0f;
        if (query >= s.seqlen_q) return;
        const float* const of_slot =
            Slot::statistics(p.launch, work.head * p.launch.slots_q + first + query / kBlockQ);
        lse[m][half] = of_slot[Slot::lse(query % kBlockQ)];
        minus_delta[m][half] = of_slot[Slot::minus_delta(query % kBlockQ)];
      });
    }
  };

  struct Place {
    int batch, head, query, key;
  };

  // The sums of the tile, or of all of it where a dimension adds up: then it is one row, one
  // column.
  static FLASHTILE_DEVICE void store(const Params& p, uint32_t smem, Block& sum, const Place& at) {
    if (adds_keys(p)) add_columns(sum);
    if (adds_queries(p)) add_rows(smem, sum);
    const int64_t first = at.batch * p.to.stride_batch + at.head * p.to.stride_head;
    for_each(sum, [&](float& x, int m, int n, int i) {
      const int row = warp_row() + accumulator_row(lane(), m, i);
      const int column = accumulator_col(lane(), n, i);
      const int query = at.query + row, key = at.key + column;
      const bool has_row = adds_queries(p) ? row == 0 : query < p.to.seqlen_q;
      const bool has_column = adds_keys(p) ? column == 0 : key < p.to.seqlen_k;
      if (!has_row || !has_column) return;
      store_number(p.to, first + query * p.to.stride_q + key * p.to.stride_k, x);
    });
  }
  static FLASHTILE_DEVICE void store_number(const ScoreView& to, int64_t offset, float x) {
    with_numbers(to, [&]<class N>(N) { *(static_cast<N*>(to.data) + offset) = static_cast<N>(x); });
  }

  // Rows of the tile: all columns' sum stands in all of them.
  static FLASHTILE_DEVICE void add_columns(Block& sum) {
    for_each_row<kRows>([&](int m, int half) {
      float x = 0.0f;
      FLASHTILE_UNROLL
      for (int n = 0; n < sum.kColBlocks; ++n)
        x += sum.d[m][n][2 * half] + sum.d[m][n][2 * half + 1];
      x += __shfl_xor_sync(0xffffffffu, x, 1);
      x += __shfl_xor_sync(0xffffffffu, x, 2);
      FLASHTILE_UNROLL
      for (int n = 0; n < sum.kColBlocks; ++n)
        sum.d[m][n][2 * half] = sum.d[m][n][2 * half + 1] = x;
    });
  }
  // Columns of the tile, through shared memory: all rows' sum stands in all of them.
  static FLASHTILE_DEVICE void add_rows(uint32_t smem, Block& sum) {
    const uint32_t own = smem + kSums + ptx::thread_index() / 32 * 4 * kBlock;
    FLASHTILE_UNROLL
    for (int n = 0; n < sum.kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 2; ++i) {
        float x = 0.0f;
        FLASHTILE_UNROLL
        for (int m = 0; m < kRows / 16; ++m) x += sum.d[m][n][i] + sum.d[m][n][i + 2];
        FLASHTILE_UNROLL
        for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
        if (lane() / 4 == 0) ptx::sts_f32(own + 4 * accumulator_col(lane(), n, i), x);
      }
    }
    __syncthreads();  // every warp's sums are there
    for_each(sum, [&](float& x, int, int n, int i) {
      x = 0.0f;
      FLASHTILE_UNROLL
      for (int w = 0; w < kWarps; ++w)
        x += ptx::lds_f32(smem + kSums + 4 * (w * kBlock + accumulator_col(lane(), n, i)));
    });
  }
};

// dsink: a block for every number or, where the sink has queries, for every 256 of them. It is
// -exp(sink - lse) delta, summed in order over what the sink repeats.
struct SinkGradientParams {
  ModifiedScores::WithScores<BackwardLaunch> launch;
  int64_t blocks_q;  // of rows of q; 1 where the sink has none
};

template <class T, int kHeadDim, class Order>
struct BackwardSinkGradient {
  using Params = SinkGradientParams;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = kThreads * sizeof(float);
  static constexpr int kBlockQ = Order::kBlockQ;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;

  static FLASHTILE_DEVICE void run(const Params& p, char* shared) {
    const Problem& problem = p.launch.params.problem;
    const ScoreView& to = p.launch.scores.of.dsink;
    const int heads = static_cast<int>(problem.num_heads);
    int64_t index = ptx::block_index();
    const int64_t block_q = index % p.blocks_q;
    index /= p.blocks_q;
    const int own_head = to.stride_head == 0 ? 0 : static_cast<int>(index % heads);
    const int own_batch = static_cast<int>(to.stride_head == 0 ? index : index / heads);
    const bool has_rows = to.stride_q != 0;
    const int64_t own_row = block_q * kThreads + ptx::thread_index();
    float sum = 0.0f;
    const bool adds_batches = to.stride_batch == 0;
    const int batches = adds_batches ? static_cast<int>(problem.batch) : own_batch + 1;
    for (int b = adds_batches ? 0 : own_batch; b < batches; ++b) {
      const Sequence s = sequence_of(problem, b);
      const int first = has_rows ? static_cast<int>(own_row - s.row_q) : ptx::thread_index();
      const int end = has_rows ? min(first + 1, s.seqlen_q) : s.seqlen_q;
      if (first < 0) continue;
      for (int head = to.stride_head == 0 ? 0 : own_head;
           head < (to.stride_head == 0 ? heads : own_head + 1); ++head) {
        for (int query = first; query < end; query += kThreads) sum += of_row(p, s, head, query);
      }
    }
    if (!has_rows) sum = of_block(ptx::shared_address(shared), sum);
    const bool stores = has_rows ? own_row < problem.rows_q() : ptx::thread_index() == 0;
    if (!stores) return;
    const int64_t offset = own_batch * to.stride_batch + own_head * to.stride_head +
                           (has_rows ? own_row * to.stride_q : 0);
    with_numbers(to,
                 [&]<class N>(N) { *(static_cast<N*>(to.data) + offset) = static_cast<N>(sum); });
  }

 private:
  static FLASHTILE_DEVICE float of_row(const Params& p, const Sequence& s, int head, int query) {
    const BackwardParams& params = p.launch.params;
    const Problem& problem = params.problem;
    const RowBlock work = {.sequence = s, .head = head};
    const float sink = sink_log2(p.launch.scores.of.sink, work, query);
    if (sink == negative_infinity()) return 0.0f;
    const float lse = *row_address(params.lse, s, s.row_q + query, head) * kLog2e;
    const int64_t first = problem.is_varlen()
                              ? first_slot(s.row_q, s.index, kBlockQ)
                              : s.batch * ceil_div(static_cast<int>(problem.seqlen_q), kBlockQ);
    const float* const statistics =
        Slot::statistics(p.launch, head * p.launch.slots_q + first + query / kBlockQ);
    const float minus_delta =
        statistics[Slot::minus_delta(query % kBlockQ)] * p.launch.scores.kept_factor;
    return ptx::ex2(sink - lse) * minus_delta;
  }
  // The sum over the block, in order, in thread 0.
  static FLASHTILE_DEVICE float of_block(uint32_t smem, float x) {
    ptx::sts_f32(smem + 4 * ptx::thread_index(), x);
    __syncthreads();
    float sum = 0.0f;
    if (ptx::thread_index() == 0) {
      for (int i = 0; i < kThreads; ++i) sum += ptx::lds_f32(smem + 4 * i);
    }
    return sum;
  }
};

// All that the call wants, behind the launches that leave the statistics.
template <class T, int kHeadDim, class Order>
Status launch_score_gradients(const ModifiedScores::WithScores<BackwardLaunch>& launch_params,
                              CUstream_st* stream) {
  const Problem& problem = launch_params.params.problem;
  const Scores& scores = launch_params.scores.of;
  using Gradients = BackwardScoreGradients<T, kHeadDim, Order>;
  const auto numbers = [&](const ScoreView& to) {  // of batch and heads
    return (to.stride_batch == 0 ? 1 : problem.batch) *
           (to.stride_head == 0 ? 1 : problem.num_heads);
  };
  const auto tiles = [](int64_t stride, int64_t length) {
    return stride == 0 ? 1 : static_cast<int>((length + Gradients::kBlock - 1) / Gradients::kBlock);
  };
  const auto sum = [&](const ScoreView& to, ScoreGradient kind) {
    if (!to.exists()) return FLASHTILE_OK;
    const ScoreGradientParams params{launch_params, to, kind, tiles(to.stride_q, to.seqlen_q),
                                     tiles(to.stride_k, to.seqlen_k)};
    return launch<Gradients>(params, numbers(to) * params.tiles_q * params.tiles_k, stream);
  };
  for (const ScoreView& dbias : scores.dbias) {
    if (Status s = sum(dbias, ScoreGradient::kBias)) return s;
  }
  if (Status s = sum(scores.dalibi_slopes, ScoreGradient::kSlopes)) return s;
  if (!scores.dsink.exists()) return FLASHTILE_OK;
  using Sink = BackwardSinkGradient<T, kHeadDim, Order>;
  const int64_t rows = scores.dsink.stride_q == 0 ? 1 : problem.rows_q();
  const int64_t blocks_q = (rows + Sink::kThreads - 1) / Sink::kThreads;
  return launch<Sink>({launch_params, blocks_q}, numbers(scores.dsink) * blocks_q, stream);
}

}  // namespace flashtile
