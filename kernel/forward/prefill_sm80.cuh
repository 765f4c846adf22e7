// The forward's loop (forward/sm80.cuh) over a key/value cache, for the sequences that have more
// queries than decoding serves. What differs is where the keys come from: every row is looked up.
#pragma once

#include "decode/plan.cuh"
#include "forward/sm80.cuh"

namespace flashtile {

struct PrefillSm80Params : ForwardSm80Params {
  Divisor page_size;
  DecodePlan plan;
};

// Keys and values of a cache on their way to shared memory, block after block. Four threads share
// a row and the search for its page; K and V are searched for apart, which needs no registers
// across the products.
template <class Tile, int kThreads>
struct CacheKeys {
  using Params = PrefillSm80Params;
  using Loader = TileLoader<Tile, kThreads>;
  using Target = typename Loader::Target;
  Target target;
  int sequence;
  int head;
  int row;  // of the sequence in the cache: the first of the block that is loaded next

  FLASHTILE_DEVICE static RowBlock query_block(const Params& params, int block) {
    const Problem& problem = params.forward.problem;
    RowBlock tile = flashtile::query_block(problem, ptx::block_index(), params.query_blocks, block,
                                           cache_sequence_of);
    if (params.plan.serves(tile.sequence.seqlen_q)) tile.owned = 0;
    return tile;
  }

  FLASHTILE_DEVICE CacheKeys(const Params& params, const RowBlock& work, int block, uint32_t k_tile,
                             int thread)
      : target(k_tile, thread),
        sequence(static_cast<int>(work.sequence.index)),
        head(work.head / params.plan.group),
        row(static_cast<int>(work.sequence.row_k) + block * Tile::kRows) {}

  // The last block, of which `keys` exist. K of a block is loaded before its V.
  FLASHTILE_DEVICE void load_last_k(const Params& params, int keys) {
    load<0>(params, params.forward.k, params.k, keys);
  }
  FLASHTILE_DEVICE void load_last_v(const Params& params, int keys) {
    load<Tile::kBytes>(params, params.forward.v, params.v, keys);
    row -= Tile::kRows;
  }
  FLASHTILE_DEVICE void load_previous_k(const Params& params) { load_last_k(params, Tile::kRows); }
  FLASHTILE_DEVICE void load_previous_v(const Params& params) { load_last_v(params, Tile::kRows); }

 private:
  template <int kTileBytes>
  FLASHTILE_DEVICE void load(const Params& params, const View& view, const RowFormat& format,
                             int keys) {
    const int column = Loader::first_column();
    // As cache_head() + column, at head dim 128 ptxas spills in the main loop.
    const char* const base =
        static_cast<const char*>(view.data) + 2 * (head * view.stride_head) + column;
    FLASHTILE_UNROLL
    for (int pass = 0; pass < Target::kPasses; ++pass) {
      const int key = load_row<Tile>(ptx::thread_index()) + pass * Target::kRowsPerPass;
      CachePlace place = {0, 0};
      if (key < keys) {
        place = cache_place(params.forward.problem.cache, params.page_size, sequence, row + key);
      }
      Loader::copy_row(target.at(pass, 0) + kTileBytes, base + place_bytes(view, place),
                       key < keys ? format.bytes - column : 0, format.unit);
    }
    ptx::cp_async_commit();
  }
};

template <Family kFamily, int kHeadDim, Variant kVariant>
Status launch_slice(Slice<Pass::kPrefill, kFamily, kHeadDim, kVariant>, const ForwardParams& params,
                    const Scores& scores, const cuda::Device&, CUstream_st* stream) {
  return with_dtype(params.problem, [&]<class T>(T) {
    using Kernel = ForwardSm80<kHeadDim, memory_of(kFamily), T, CacheKeys, ScorePolicyOf<kVariant>>;
    const PrefillSm80Params base{forward_sm80_params<kHeadDim, Kernel::kQueries>(params),
                                 Divisor(static_cast<uint32_t>(params.problem.cache.page_size)),
                                 decode_plan(params.problem)};
    return launch_forward_kernel<Kernel>(base, scores, stream);
  });
}

}  // namespace flashtile
