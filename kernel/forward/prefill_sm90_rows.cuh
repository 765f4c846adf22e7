// Keys and values of a cache with left padding or pages of any size: four warps copy a block row by
// row.
#pragma once

#include "forward/prefill_sm90_boxes.cuh"
#include "ptx/ampere.cuh"
#include "tile/load_sm80.cuh"

namespace flashtile {

struct PageRowsParams : ForwardSm90Params {
  PrefillTiles tiles_of;
  View k, v;
};

// A warp has eight neighbouring rows of every 32, whose places its lanes look up. V is on its way
// while the next K is ordered. Not the other way round: the consumers give back a V only when the K
// two blocks on is there.
template <class Tile>
struct PageRows : PageSource {
  using Params = PageRowsParams;
  static constexpr int kWarps = 4;
  static constexpr int kArrivals = kWarps;
  using Loader = TileLoader<Tile, 32 * kWarps>;
  using Target = typename Loader::Target;
  static_assert(8 * Target::kPasses <= 32, "a lane looks up one row");
  int origin;              // the sequence's row in the cache that is key 0
  CachePlace place;        // of this lane's row of the block that is loaded next
  uint32_t v_ordered = 0;  // mbarrier of a V that may not have landed

  FLASHTILE_DEVICE static void prefetch_maps(const Params&) {}

  FLASHTILE_DEVICE PageRows(const Params& params, const RowBlock& work, const BlockRange& range)
      : PageSource(params.problem, work, range),
        origin(static_cast<int>(work.sequence.row_k)),
        place(find(params, range.end - 1)) {}

  template <class Shared>
  FLASHTILE_DEVICE void load(const Params& params, const Shared& shared, int block, int use) {
    shared.k_ring().wait_until_free(use);
    copy(params.k, static_cast<int>(params.problem.head_dim), shared.k(use));
    finish<1>();
    announce<0>(shared.k_ring().full(use));
    shared.v_ring().wait_until_free(use);
    copy(params.v, static_cast<int>(params.problem.head_dim_v), shared.v(use));
    v_ordered = shared.v_ring().full(use);
    place = find(params, block - 1);  // now: the table answers while a buffer is waited for
  }
  // All copies but the last kPending tiles have landed, that of a V among them.
  template <int kPending = 0>
  FLASHTILE_DEVICE void finish() const {
    if (v_ordered != 0) announce<kPending>(v_ordered);
  }

 private:
  FLASHTILE_DEVICE void copy(const View& view, int head_dim, uint32_t tile) const {
    const Target target(tile, ptx::thread_index());
    const int column = Loader::first_column();
    const char* const base = cache_head(view, head) + column;
    FLASHTILE_UNROLL
    for (int pass = 0; pass < Target::kPasses; ++pass) {
      const int row = load_row<Tile>(ptx::thread_index()) + pass * Target::kRowsPerPass;
      const int lane = pass * 8 + row % 8;
      const CachePlace from = {__shfl_sync(0xffffffffu, place.page, lane),
                               __shfl_sync(0xffffffffu, place.row, lane)};
      if (!Loader::kWholePasses && row >= Tile::kRows) continue;
      Loader::copy_row(target.at(pass, 0), base + place_bytes(view, from),
                       from.row >= 0 ? 2 * head_dim - column : 0, kChunkBytes);
    }
    ptx::cp_async_commit();
  }

  // wgmma may read what this warp has copied to a buffer; at most kPending tiles came after it.
  template <int kPending>
  FLASHTILE_DEVICE static void announce(uint32_t barrier) {
    ptx::cp_async_wait<kPending>();
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::thread_index() % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  // Nothing is looked up for rows that the sequence does not have.
  FLASHTILE_DEVICE CachePlace find(const Params& params, int block) const {
    const int thread = ptx::thread_index();
    const int row = thread % 32 / 8 * Target::kRowsPerPass + thread / 32 * 8 + thread % 8;
    const int key = block * Tile::kRows + row;
    if (block < begin || row >= Tile::kRows || key >= count) return {0, -1};
    return cache_place(params.problem.cache, params.tiles_of.page_size, sequence, origin + key);
  }
};

struct PageRowKeys {
  template <class Tile>
  using Source = PageRows<Tile>;
  static consteval ForwardSm90Config config(int head_dim, Variant variant) {
    return page_rows_config(head_dim, variant);
  }
};

}  // namespace flashtile
