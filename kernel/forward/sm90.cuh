// Forward for compute capability 9.0 (sm_90a): one warp loads, two or three warpgroups compute 64
// queries each. The same algorithm and the same softmax as forward/sm80.cuh.
//
// Blocks of K and V come by TMA into two rings. A warpgroup has two products in flight at a time,
// S = Q K_j^T and O += P V_{j+1} of the block before, and turns S into P while the second runs; the
// other warpgroups' products run meanwhile, because they take turns at issuing
// (docs/kernels/forward.md has the time line).
#pragma once

#include <algorithm>

#include "config.cuh"
#include "cuda/slices.cuh"
#include "cuda/tensor_map.h"
#include "launch.cuh"
#include "params.h"
#include "ptx/hopper.cuh"
#include "tile/band_edges.cuh"
#include "tile/epilogue_sm90.cuh"
#include "tile/finish_scores.cuh"
#include "tile/mask.cuh"
#include "tile/product_sm90.cuh"
#include "tile/ring_sm90.cuh"
#include "tile/score_hooks.cuh"
#include "tile/softmax.cuh"
#include "tile/tma_rows.cuh"
#include "tile/work.cuh"

namespace flashtile {

struct ForwardSm90Params {
  TensorMap q, out;
  Problem problem;
  RowView lse;
  int32_t query_blocks;  // see query_blocks()
  int32_t tiles;         // see query_tile_count()
  float scale_log2;      // positive_scale_log2(softmax_scale)
  bool negate_q;         // softmax_scale < 0
};
struct TensorBoxesParams : ForwardSm90Params {
  TensorMap k, v;
};

// Keys and values that are whole tensors, on their way to shared memory: a block is one box, which
// one thread loads. `Tile`: a block.
template <class Tile>
struct TensorBoxes {
  using Params = TensorBoxesParams;
  static constexpr int kWarps = 1;     // that load
  static constexpr int kArrivals = 1;  // when a block has landed, besides its bytes
  int first, count;                    // the sequence's rows
  TmaRows rows;                        // of the block that is loaded

  FLASHTILE_DEVICE static bool takes_part() { return ptx::elect_one(); }
  FLASHTILE_DEVICE static bool leads() { return true; }
  FLASHTILE_DEVICE static void prefetch_maps(const Params& params) {
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
  }
  // The block's next tile.
  FLASHTILE_DEVICE static int tile_after(int index) { return index + ptx::grid_size(); }
  FLASHTILE_DEVICE static RowBlock query_block(const Params& params, int index, int block) {
    return flashtile::query_block(params.problem, index, params.query_blocks, block);
  }

  FLASHTILE_DEVICE TensorBoxes(const Params& params, const RowBlock& work, const BlockRange&)
      : first(static_cast<int>(work.sequence.row_k)),
        count(work.sequence.seqlen_k),
        rows{0, 0, key_head(params.problem, work.head), static_cast<int>(work.sequence.batch)} {}

  // Blocks come one after another, the last one first; `shared` says where they go.
  template <class Shared>
  FLASHTILE_DEVICE void load(const Params& params, const Shared& shared, int block, int use) {
    rows.row = first + block * Tile::kRows;
    rows.count = count - block * Tile::kRows;
    shared.k_ring().acquire(use, Tile::kBytes);
    load_tile<Tile>(shared.k(use), params.k, shared.k_ring().full(use), rows);
    shared.v_ring().acquire(use, Tile::kBytes);
    load_tile<Tile>(shared.v(use), params.v, shared.v_ring().full(use), rows);
  }
  FLASHTILE_DEVICE void finish() {}  // after the last block
};

// Where keys come from, and the block of threads that this takes.
struct TensorKeys90 {
  template <class Tile>
  using Source = TensorBoxes<Tile>;
  static consteval ForwardSm90Config config(int head_dim, Variant variant) {
    return forward_sm90_config(head_dim, variant);
  }
};

template <int kHeadDim, class T, class Keys = TensorKeys90, class Policy = PlainScores>
struct ForwardSm90 {
  using ScorePolicy = Policy;
  static constexpr ForwardSm90Config kConfig = Keys::config(kHeadDim, ScorePolicy::kVariant);
  static constexpr int kThreads = kConfig.threads();
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kConsumers = kConfig.consumers;
  // Who gives a buffer back: every warp that computes, since its wait for wgmma is for its own.
  static constexpr int kReaders = 4 * kConsumers;
  static constexpr int kQueries = kConfig.block_q();
  static constexpr int kRows = 64;  // of a warpgroup
  static constexpr int kKeys = kConfig.block_k;

  using QTile = WideTile<kQueries, kHeadDim>;
  using KvTile = WideTile<kKeys, kHeadDim>;
  using Source = typename Keys::template Source<KvTile>;
  using Hooks = ScoreHooks<ScorePolicy, 16, -64>;  // a warpgroup before the consumers loads
  using Params = typename Hooks::template Params<typename Source::Params>;
  using QRing = Ring<kConfig.q_stages>;
  using KvRing = Ring<kConfig.stages>;
  using Scores = Accumulator<16, kKeys>;
  using Output = Accumulator<16, kHeadDim>;
  using Softmax = OnlineSoftmax<16>;

  // Shared memory: the stages of Q, each later O; those of K; those of V; the shifts of the
  // softmax; with scores, their notes, of every stage of Q; mbarriers.
  static constexpr int kFromQToK = kConfig.q_stages * QTile::kBytes;
  static constexpr int kFromQToV = kFromQToK + kConfig.stages * KvTile::kBytes;
  static constexpr int kFromQToShifts = kFromQToV + kConfig.stages * KvTile::kBytes;
  static constexpr int kFromQToNotes = kFromQToShifts + kQueries * sizeof(float);
  // A largest logit of every warp of the block.
  static constexpr int kNoteBytes = ScoreNotes::kTops + (kThreads / 32 + 3) / 4 * 16;
  static constexpr int kFromQToBarriers =
      kFromQToNotes + (ScorePolicy::kModifies ? kConfig.q_stages * kNoteBytes : 0);
  static constexpr int kSharedBytes = kFromQToBarriers + QRing::kBytes + 2 * KvRing::kBytes;
  static_assert(kSharedBytes <= kSharedLimitSm90);
  static_assert(QTile::kPanelBytes % 1024 == 0 && KvTile::kPanelBytes % 1024 == 0);

  // Named barriers: of one warpgroup, and whose turn it is.
  static constexpr int kOwnBarrier = 1;
  static constexpr int kTurnBarrier = kOwnBarrier + kConsumers;

  FLASHTILE_DEVICE static void run(const Params& params, char* shared_memory) {
    const Shared shared(ptx::shared_address(shared_memory));
    const int thread = ptx::thread_index();
    if (thread == 0) {
      shared.q_ring().init(kReaders);
      shared.k_ring().init(kReaders, Source::kArrivals);
      shared.v_ring().init(kReaders, Source::kArrivals);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();  // the mbarriers are there
    const int warpgroup = ptx::warp_uniform(thread / 128);
    if (warpgroup == 0) {
      ptx::setmaxnreg_dec<kConfig.producer_registers>();
      if (ptx::warp_uniform(thread / 32) < Source::kWarps && Source::takes_part())
        produce(params, shared);
    } else {
      ptx::setmaxnreg_inc<kConfig.consumer_registers>();
      consume(params, shared, warpgroup - 1);
    }
  }

 private:
  // Where things are.
  struct Shared {
    uint32_t first;

    FLASHTILE_DEVICE explicit Shared(uint32_t address) : first(address) {}
    FLASHTILE_DEVICE uint32_t q(int use) const { return first + QRing::stage(use) * QTile::kBytes; }
    FLASHTILE_DEVICE uint32_t k(int use) const {
      return first + kFromQToK + KvRing::stage(use) * KvTile::kBytes;
    }
    FLASHTILE_DEVICE uint32_t v(int use) const {
      return first + kFromQToV + KvRing::stage(use) * KvTile::kBytes;
    }
    FLASHTILE_DEVICE uint32_t shifts(int row) const { return first + kFromQToShifts + row * 4; }
    FLASHTILE_DEVICE uint32_t notes(int tile) const {
      return first + kFromQToNotes + QRing::stage(tile) * kNoteBytes;
    }
    FLASHTILE_DEVICE QRing q_ring() const { return {first + kFromQToBarriers}; }
    FLASHTILE_DEVICE KvRing k_ring() const { return {first + kFromQToBarriers + QRing::kBytes}; }
    FLASHTILE_DEVICE KvRing v_ring() const { return {k_ring().barriers + KvRing::kBytes}; }
  };

  // The tiles of this thread block, in order.
  template <class Body>
  FLASHTILE_DEVICE static void for_each_tile(const Params& params, const Body& body) {
    FLASHTILE_ROLL
    for (int index = ptx::block_index(); index < params.tiles; index = Source::tile_after(index)) {
      const RowBlock work = Source::query_block(params, index, kQueries);
      if (!work.empty()) body(work);
    }
  }

  // Loads whatever the consumers will ask for, in their order. By one thread, or as many as the
  // source of the keys takes.
  FLASHTILE_DEVICE static void produce(const Params& params, const Shared& shared) {
    const bool leads = Source::leads();  // one thread
    if (leads) {
      ptx::prefetch_tensor_map(params.q);
      Source::prefetch_maps(params);
    }
    int tile = 0, use = 0;  // of the rings
    for_each_tile(params, [&](const RowBlock& work) {
      if (leads) load_q(params, shared, work, tile);
      ++tile;
      const BlockRange range = key_blocks(params.problem, work, kQueries, kKeys);
      Source source(params, work, range);
      FLASHTILE_ROLL
      for (int j = range.end - 1; j >= range.begin; --j, ++use) source.load(params, shared, j, use);
      source.finish();
    });
  }

  FLASHTILE_DEVICE static void load_q(const Params& params, const Shared& shared,
                                      const RowBlock& work, int tile) {
    const Sequence& sequence = work.sequence;
    if constexpr (ScorePolicy::kModifies) {  // notes come and go with Q
      shared.q_ring().wait_until_free(tile);
      ScorePolicy::note(params.problem, params.scores, work, shared.notes(tile));
    }
    shared.q_ring().acquire(tile, QTile::kBytes);
    load_tile<QTile>(shared.q(tile), params.q, shared.q_ring().full(tile),
                     {static_cast<int>(sequence.row_q) + work.row0, work.rows, work.head,
                      static_cast<int>(sequence.batch)});
  }

  // One warpgroup: its 64 rows of every tile.
  struct Consumer {
    Shared shared;
    int warpgroup;
    int use = 0;  // of the rings of K and V

    FLASHTILE_DEVICE Consumer(const Shared& shared, int warpgroup)
        : shared(shared), warpgroup(warpgroup) {}

    // Products are issued in turn, so that one warpgroup's run while another has its softmax.
    FLASHTILE_DEVICE void wait_for_turn() const {
      ptx::named_barrier_sync(kTurnBarrier + warpgroup, 256);
    }
    FLASHTILE_DEVICE void pass_turn() const {
      const int next = warpgroup + 1 < kConsumers ? warpgroup + 1 : 0;
      ptx::named_barrier_arrive(kTurnBarrier + next, 256);
    }
    FLASHTILE_DEVICE static bool is_first_thread() { return ptx::thread_index() % 128 == 0; }
    FLASHTILE_DEVICE static bool is_first_lane() { return ptx::thread_index() % 32 == 0; }

    // S = Q K^T of a use of the ring. `q`: descriptor of this warpgroup's rows.
    FLASHTILE_DEVICE void issue_scores(Scores& s, uint32_t q, int use) const {
      issue_ABt<T, QTile, KvTile>(s, q, tile_descriptor<KvTile>(shared.k(use)));
      ptx::wgmma_commit();
    }
    // O += P V.
    FLASHTILE_DEVICE void issue_output(Output& o, const uint32_t (&p)[kKeys / 16][4],
                                       int use) const {
      issue_AB<T, KvTile>(o, p, tile_descriptor<KvTile>(shared.v(use)));
      ptx::wgmma_commit();
    }
    // The last product but kPending has read its block of K.
    template <int kPending>
    FLASHTILE_DEVICE void finish_scores(Scores& s, int use) const {
      ptx::wgmma_wait<kPending>();
      ptx::keep_in_order(s.d[0]);
      if (is_first_lane()) shared.k_ring().release(use);
    }
    FLASHTILE_DEVICE void finish_output(Output& o, int use) const {
      ptx::wgmma_wait<0>();
      ptx::keep_in_order(o.d[0]);
      if (is_first_lane()) shared.v_ring().release(use);
    }

    // S -> P.
    FLASHTILE_DEVICE static void exponentiate(Softmax& softmax, Scores& s) {
      FLASHTILE_UNROLL
      for (int step = 0; step < kKeys / 16; ++step) softmax.exponentiate(s, step);
    }
    FLASHTILE_DEVICE static void round(uint32_t (&p)[kKeys / 16][4], const Scores& s) {
      FLASHTILE_UNROLL
      for (int step = 0; step < kKeys / 16; ++step) to_operand<T>(p[step], s, 0, step);
    }

    // All blocks of a range that is not empty: O, not yet divided by the row sums.
    FLASHTILE_DEVICE void attend(Output& o, Softmax& softmax, uint32_t q, const BlockRange& range,
                                 const BandEdges& edges, const Hooks& hooks) {
      Scores s;
      uint32_t p[kKeys / 16][4];
      shared.k_ring().wait(use);
      ptx::wgmma_fence();
      issue_scores(s, q, use);
      finish_scores<0>(s, use);
      if constexpr (Hooks::kExist) hooks.to_logits(s, (range.end - 1) * kKeys);
      edges.mask(s, range, range.end - 1);
      if constexpr (Hooks::kExist) hooks.keep_top(s);
      softmax.raise_maximum(s, [](int, int, float) {});
      exponentiate(softmax, s);
      if constexpr (Hooks::kExist) hooks.drop(s, (range.end - 1) * kKeys);
      round(p, s);
      if (range.end - 1 > range.begin) shared.k_ring().wait(use + 1);
      FLASHTILE_ROLL
      for (int j = range.end - 2; j >= range.begin; --j, ++use) {
        wait_for_turn();
        ptx::wgmma_fence();
        issue_scores(s, q, use + 1);
        shared.v_ring().wait(use);
        ptx::wgmma_fence();
        issue_output(o, p, use);
        pass_turn();
        finish_scores<1>(s, use + 1);
        if constexpr (Hooks::kExist) hooks.to_logits(s, j * kKeys);
        edges.mask(s, range, j);
        if constexpr (Hooks::kExist) hooks.keep_top(s);
        float factor[2] = {1.0f, 1.0f};
        const bool rescales = softmax.raise_maximum(
            s, [&](int, int half, float row_factor) { factor[half] = row_factor; });
        exponentiate(softmax, s);
        if constexpr (Hooks::kExist) hooks.drop(s, j * kKeys);
        // Here, so that ptxas does not move the exponentials behind the wait for O: it does not
        // move them across a branch.
        if (j > range.begin) shared.k_ring().wait(use + 2);
        finish_output(o, use);
        if (rescales) scale_rows(o, factor);
        round(p, s);
      }
      shared.v_ring().wait(use);
      ptx::wgmma_fence();
      issue_output(o, p, use);
      finish_output(o, use);
      ++use;
    }
  };

  FLASHTILE_DEVICE static void consume(const Params& params, const Shared& shared, int warpgroup) {
    Consumer consumer(shared, warpgroup);
    const int lane = ptx::thread_index() % 32;
    const int warp_row = ptx::thread_index() / 32 * 16 - 64;  // in the tile
    if (warpgroup == kConsumers - 1) consumer.pass_turn();    // the first one begins
    int tile = 0;
    for_each_tile(params, [&](const RowBlock& work) {
      const BlockRange range = key_blocks(params.problem, work, kQueries, kKeys);
      Output o;
      clear(o);
      Softmax softmax(params.scale_log2, shared.shifts(warp_row));
      const Hooks hooks(params, shared.notes(tile));
      if constexpr (Hooks::kExist) ScorePolicy::clear_top(hooks.at());
      shared.q_ring().wait(tile);
      if (params.negate_q) negate_rows<QTile>(shared.q(tile), warpgroup, kOwnBarrier + warpgroup);
      if (!range.empty()) {
        const BandEdges edges(band_mask(params.problem, work.sequence), work.row0 + warp_row, lane);
        const uint32_t q = tile_descriptor<QTile>(shared.q(tile), warpgroup * kRows);
        consumer.attend(o, softmax, q, range, edges, hooks);
      }
      if constexpr (Hooks::kExist) hooks.finish(softmax, work.head);
      finish(params, work, o, softmax, shared.q(tile), warpgroup);
      if (Consumer::is_first_lane()) shared.q_ring().release(tile);
      ++tile;
    });
  }

  // O / row sum and the LSE to global memory; O over this warpgroup's rows of Q.
  FLASHTILE_DEVICE static void finish(const Params& params, const RowBlock& work, Output& o,
                                      const Softmax& softmax, uint32_t tile, int warpgroup) {
    const Sequence& sequence = work.sequence;
    const int lane = ptx::thread_index() % 32;
    const int warp_row = ptx::thread_index() / 32 * 16 - 64;
    const auto factors = [&] {
      if constexpr (ScorePolicy::kModifies) {
        return finish_rows(ScoredProblem{params.problem, params.scores}, params.lse, work,
                           {warp_row, lane}, o, softmax);
      } else {
        return finish_rows(params.problem, params.lse, work, {warp_row, lane}, o, softmax);
      }
    }();
    scale_rows(o, factors.of[0]);
    store_fragments<T, QTile>(tile, warp_row, lane, o);
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(kOwnBarrier + warpgroup, 128);  // all rows of the warpgroup are there
    const int count = work.owned - warpgroup * kRows;
    if (Consumer::is_first_thread() && count > 0) {
      store_tile<QTile, kRows>(params.out, tile, warpgroup * kRows,
                               {static_cast<int>(sequence.row_q) + work.row0 + warpgroup * kRows,
                                count, work.head, static_cast<int>(sequence.batch)});
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
    }
  }
};

// Whether all tiles take equally long. Then a thread block on each multiprocessor works on several
// tiles and loads the next one while it stores; otherwise the hardware deals them out, one a block,
// the longest first.
inline bool is_uniform(const Problem& problem) {
  return !problem.is_varlen() && problem.seqused_q == nullptr && problem.seqused_k == nullptr &&
         problem.band.left < 0 && problem.band.right < 0;
}

inline Status count_multiprocessors(int device, int& count) {
  return check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                    "cudaDeviceGetAttribute(MultiProcessorCount)");
}

// All but what says where the keys are.
template <class Kernel>
Status set_forward_sm90_params(const ForwardParams& params, ForwardSm90Params& p) {
  const Problem& problem = params.problem;
  p.problem = problem;
  p.lse = params.lse;
  p.query_blocks = static_cast<int32_t>(query_blocks(problem, Kernel::kQueries));
  p.tiles = static_cast<int32_t>(query_tile_count(problem, Kernel::kQueries));
  p.scale_log2 = positive_scale_log2(problem.softmax_scale);
  p.negate_q = problem.softmax_scale < 0.0f;
  return encode_tensor_maps(
      {{query_tensor("q", params.q, problem, problem.head_dim), Kernel::kQueries, p.q},
       {query_tensor("out", params.out, problem, problem.head_dim_v), Kernel::kRows, p.out}});
}
// K and V in boxes of `box_rows`.
inline Status set_key_boxes(const ForwardParams& params, int box_rows, TensorBoxesParams& p) {
  const Problem& problem = params.problem;
  return encode_tensor_maps(
      {{key_tensor("k", params.k, problem, problem.head_dim), box_rows, p.k},
       {key_tensor("v", params.v, problem, problem.head_dim_v), box_rows, p.v}});
}

template <class Kernel>
Status launch_forward_sm90_kernel(const ForwardParams& params, const Scores& scores, int device,
                                  CUstream_st* stream) {
  if constexpr (Kernel::ScorePolicy::kModifies) {
    if (Status s = clear_max_logit<Kernel>(params.problem, scores, stream)) return s;
  }
  if (query_tile_count(params.problem, Kernel::kQueries) == 0) return FLASHTILE_OK;
  if (Status s = prepare<Kernel>()) return s;
  TensorBoxesParams p{};
  if (Status s = set_forward_sm90_params<Kernel>(params, p)) return s;
  if (Status s = set_key_boxes(params, Kernel::kKeys, p)) return s;
  int64_t blocks = p.tiles;
  if (is_uniform(p.problem)) {
    int multiprocessors = 0;
    if (Status s = count_multiprocessors(device, multiprocessors)) return s;
    blocks = std::min<int64_t>(blocks, multiprocessors);
  }
  return launch_prepared<Kernel>(with_hooks<Kernel>(p, p.problem, scores), blocks, stream);
}

template <int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kForward, Family::kSm90, kHeadDim, kVariant>,
                    const ForwardParams& params, const Scores& scores, const cuda::Device& device,
                    CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    using Kernel = ForwardSm90<kHeadDim, T, TensorKeys90, ScorePolicyOf<kVariant>>;
    return launch_forward_sm90_kernel<Kernel>(params, scores, device.index, stream);
  });
}

}  // namespace flashtile
