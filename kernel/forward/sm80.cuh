// Forward for compute capability 8.0 and later: one thread block computes one tile of queries
// against all the keys it sees, O = softmax(scale * Q K^T) V and the logarithm of the softmax's
// denominator.
//
// FlashAttention-2, Algorithm 1, over mma.sync and cp.async. Keys are visited from the last block
// to the first, so that the ragged end is loaded before the loop. One buffer for K and one for V:
// while one is multiplied, the other is on its way (docs/kernels/forward.md has the time line).
#pragma once

#include <type_traits>

#include "config.cuh"
#include "cuda/slices.cuh"
#include "launch.cuh"
#include "params.h"
#include "tile/band_edges.cuh"
#include "tile/epilogue.cuh"
#include "tile/finish_scores.cuh"
#include "tile/load_sm80.cuh"
#include "tile/mask.cuh"
#include "tile/product_sm80.cuh"
#include "tile/row_format.cuh"
#include "tile/score_hooks.cuh"
#include "tile/softmax.cuh"
#include "tile/work.cuh"

namespace flashtile {

struct ForwardSm80Params {
  ForwardParams forward;
  RowFormat q, k, v, out;
  int32_t fills_k, fills_v;  // fills_tile(): 0 or 1, as one comparison takes it
  int32_t query_blocks;      // see query_blocks()
  float scale_log2;          // positive_scale_log2(softmax_scale)
  bool negate_q;             // softmax_scale < 0
};

// The keys and values of one head on their way to shared memory, block after block, where they are
// rows of a tensor. forward/prefill_sm80.cuh has the other form, for a cache.
template <class Tile, int kThreads>
struct TensorKeys {
  using Params = ForwardSm80Params;
  using Loader = TileLoader<Tile, kThreads>;
  typename Loader::Target target;
  Loader k, v;

  FLASHTILE_DEVICE static RowBlock query_block(const Params& params, int block) {
    return flashtile::query_block(params.forward.problem, ptx::block_index(), params.query_blocks,
                                  block);
  }

  FLASHTILE_DEVICE TensorKeys(const Params& params, const RowBlock& work, int block,
                              uint32_t k_tile, int thread)
      : target(k_tile, thread),
        k(loader(params.forward.k, params.forward.problem, work, block, thread)),
        v(loader(params.forward.v, params.forward.problem, work, block, thread)) {}

  // The last block, of which `keys` exist.
  FLASHTILE_DEVICE void load_last_k(const Params& params, int keys) {
    k.template load<0>(target, params.k, keys);
    ptx::cp_async_commit();
  }
  FLASHTILE_DEVICE void load_last_v(const Params& params, int keys) {
    v.template load<Tile::kBytes>(target, params.v, keys);
    ptx::cp_async_commit();
  }
  FLASHTILE_DEVICE void load_previous_k(const Params& params) {
    k.template load_whole<0>(target, params.k, params.fills_k);
    ptx::cp_async_commit();
  }
  FLASHTILE_DEVICE void load_previous_v(const Params& params) {
    v.template load_whole<Tile::kBytes>(target, params.v, params.fills_v);
    ptx::cp_async_commit();
  }

 private:
  FLASHTILE_DEVICE static Loader loader(const View& view, const Problem& problem,
                                        const RowBlock& work, int block, int thread) {
    const int64_t row = work.sequence.row_k + (int64_t{block} + 1) * Tile::kRows;
    return Loader(row_address(view, work.sequence, row, key_head(problem, work.head)),
                  view.stride_seq, thread);
  }
};

template <int kHeadDim, Memory kMemory, class T, template <class, int> class Keys = TensorKeys,
          class Policy = PlainScores>
struct ForwardSm80 {
  using ScorePolicy = Policy;
  static constexpr ForwardConfig kConfig = forward_config(kMemory, kHeadDim, ScorePolicy::kVariant);
  static constexpr int kThreads = kConfig.warps * 32;
  static constexpr int kBlocksPerSm = kConfig.blocks_per_sm;
  static constexpr int kQueries = kConfig.block_q;
  static constexpr int kKeys = kConfig.block_k;
  static constexpr int kRows = kQueries / kConfig.warps;  // of a warp

  using QTile = SmemTile<kQueries, kHeadDim>;
  using KvTile = SmemTile<kKeys, kHeadDim>;
  using QRows = LaneAddress<QTile>;
  using QOperand = std::conditional_t<kConfig.q_in_registers, RegisterOperand<QRows, kRows>,
                                      SharedOperand<QRows, kRows>>;
  using QLoader = TileLoader<QTile, kThreads>;
  using KvStream = Keys<KvTile, kThreads>;
  using Hooks = ScoreHooks<ScorePolicy, kRows, 0>;
  using Params = typename Hooks::template Params<typename KvStream::Params>;

  // Shared memory: Q, later O; then K; then V; then the shifts of the softmax and, with scores,
  // their notes.
  static constexpr int kFromKToV = KvTile::kBytes;
  static constexpr int kFromQToShifts = QTile::kBytes + 2 * KvTile::kBytes;
  static constexpr int kFromQToNotes = kFromQToShifts + kQueries * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes =
      kFromQToNotes + (ScorePolicy::kModifies ? ScoreNotes::kBytes : 0);
  static_assert(kBlocksPerSm * (kSharedBytes + 1024) <= shared_memory_limit(kMemory) + 1024);

  FLASHTILE_DEVICE static void run(const Params& params, char* shared) {
    const RowBlock work = KvStream::query_block(params, kQueries);
    if (work.empty()) return;
    const BlockRange range = key_blocks(params.forward.problem, work, kQueries, kKeys);

    const int thread = ptx::thread_index();
    const int lane = thread % 32;
    const int warp_row = thread / 32 * kRows;
    const uint32_t q_tile = ptx::shared_address(shared);
    const uint32_t k_tile = q_tile + QTile::kBytes;

    Accumulator<kRows, kHeadDim> o;  // not yet divided by the row sums
    clear(o);
    OnlineSoftmax<kRows> softmax(params.scale_log2, q_tile + kFromQToShifts + warp_row * 4);
    const Hooks hooks(params, q_tile + kFromQToNotes);
    if constexpr (Hooks::kExist) {
      ScorePolicy::clear_top(hooks.at());
      if (thread == 0) ScorePolicy::note(params.forward.problem, params.scores, work, hooks.notes);
    }

    if (!range.empty()) {
      KvStream stream(params, work, range.end - 1, k_tile, thread);
      const BandEdges edges(band_mask(params.forward.problem, work.sequence), work.row0 + warp_row,
                            lane);
      start(params, work, range.end - 1, q_tile, thread, stream);

      QOperand q(QRows(q_tile, Lanes::kRowsFirst, lane, warp_row));
      const LaneAddress<KvTile> k(k_tile, Lanes::kColsFirst, lane);
      const LaneAddress<KvTile> v(k_tile + kFromKToV, Lanes::kRowsFirst, lane);
      q.load();
      for (int j = range.end - 1;; --j) {
        ptx::opaque(j);
        Accumulator<kRows, kKeys> s;
        mma_ABt<T>(s, q, k);  // S = Q K_j^T
        ptx::cp_async_wait<0>();
        __syncthreads();  // V_j has landed; all warps are done with K_j
        if (j > range.begin) stream.load_previous_k(params);
        if constexpr (Hooks::kExist) hooks.to_logits(s, j * kKeys);
        edges.mask(s, range, j);
        if constexpr (Hooks::kExist) hooks.keep_top(s);
        softmax.raise_maximum(s, o);
        FLASHTILE_UNROLL
        for (int step = 0; step < kKeys / 16; ++step) {
          softmax.exponentiate(s, step);  // S -> P
          if constexpr (Hooks::kExist) hooks.drop_step(s, step, j * kKeys);
          uint32_t p[kRows / 16][4];
          FLASHTILE_UNROLL
          for (int m = 0; m < kRows / 16; ++m) to_operand<T>(p[m], s, m, step);
          mma_AB_step<T>(o, p, v, step);  // O += P V_j
        }
        if (j == range.begin) break;
        ptx::cp_async_wait<0>();
        __syncthreads();  // K_{j-1} has landed; all warps are done with V_j
        stream.load_previous_v(params);
      }
    }
    finish(params, o, softmax, q_tile);
  }

 private:
  // Loads Q and the last block of K and V; returns when Q and K have landed.
  FLASHTILE_DEVICE static void start(const Params& params, const RowBlock& work, int block,
                                     uint32_t q_tile, int thread, KvStream& stream) {
    const View& q = params.forward.q;
    const typename QLoader::Target q_target(q_tile, thread);
    const int64_t q_end = work.sequence.row_q + work.row0 + kQueries;
    QLoader q_loader(row_address(q, work.sequence, q_end, work.head), q.stride_seq, thread);
    const int keys = work.sequence.seqlen_k - block * kKeys;
    q_loader.load(q_target, params.q, work.rows);
    stream.load_last_k(params, keys);
    stream.load_last_v(params, keys);
    ptx::cp_async_wait<1>();
    if (params.negate_q) negate(q_target);
    __syncthreads();  // Q and K have landed, and Q has its sign
  }

  // O / row sum and the LSE to global memory. Works out its tile again: kept across the main loop,
  // it would take registers there.
  FLASHTILE_DEVICE static void finish(const Params& params, Accumulator<kRows, kHeadDim>& o,
                                      OnlineSoftmax<kRows>& softmax, uint32_t q_tile) {
    const RowBlock work = KvStream::query_block(params, kQueries);
    const int thread = ptx::thread_index();
    const int lane = thread % 32;
    const int warp_row = thread / 32 * kRows;
    const ForwardParams& forward = params.forward;
    const auto factors = [&] {
      if constexpr (Hooks::kExist) {
        Hooks(params, q_tile + kFromQToNotes).finish(softmax, work.head);
        return finish_rows(ScoredProblem{forward.problem, params.scores}, forward.lse, work,
                           {warp_row, lane}, o, softmax);
      } else {
        return finish_rows(forward.problem, forward.lse, work, {warp_row, lane}, o, softmax);
      }
    }();
    store_shared<T, QTile>(q_tile, warp_row, lane, o, factors);  // this warp's own rows of Q
    __syncwarp();
    const View& out = forward.out;
    char* const first = row_address(out, work.sequence, work.sequence.row_q + work.row0, work.head);
    store_global<QTile, kRows>({first, out.stride_seq, work.owned, params.out}, q_tile, warp_row,
                               lane);
  }
};

template <int kHeadDim, int kQueries>
ForwardSm80Params forward_sm80_params(const ForwardParams& params) {
  const Problem& problem = params.problem;
  const RowFormat k = key_format(params.k, problem, problem.head_dim);
  const RowFormat v = key_format(params.v, problem, problem.head_dim_v);
  return {.forward = params,
          .q = query_format(params.q, problem, problem.head_dim),
          .k = k,
          .v = v,
          .out = query_format(params.out, problem, problem.head_dim_v),
          .fills_k = fills_tile(k, kHeadDim),
          .fills_v = fills_tile(v, kHeadDim),
          .query_blocks = static_cast<int32_t>(query_blocks(problem, kQueries)),
          .scale_log2 = positive_scale_log2(problem.softmax_scale),
          .negate_q = problem.softmax_scale < 0.0f};
}

// `base`: what the plain kernel is given.
template <class Kernel, class Base>
Status launch_forward_kernel(const Base& base, const Scores& scores, CUstream_st* stream) {
  const Problem& problem = base.forward.problem;
  if constexpr (Kernel::ScorePolicy::kModifies) {
    if (Status s = clear_max_logit<Kernel>(problem, scores, stream)) return s;
  }
  return launch<Kernel>(with_hooks<Kernel>(base, problem, scores),
                        query_tile_count(problem, Kernel::kQueries), stream);
}

template <Family kFamily, int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kForward, kFamily, kHeadDim, kVariant>, const ForwardParams& params,
                    const Scores& scores, const cuda::Device&, CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    using Kernel =
        ForwardSm80<kHeadDim, memory_of(kFamily), T, TensorKeys, ScorePolicyOf<kVariant>>;
    return launch_forward_kernel<Kernel>(forward_sm80_params<kHeadDim, Kernel::kQueries>(params),
                                         scores, stream);
  });
}

}  // namespace flashtile
