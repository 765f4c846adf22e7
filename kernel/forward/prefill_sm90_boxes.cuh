// Keys and values of a cache whose pages TMA takes: each piece of a page is a box of its own.
#pragma once

#include <numeric>

#include "decode/plan.cuh"
#include "forward/sm90.cuh"

namespace flashtile {

// The tiles of prefill; decoding serves the others.
struct PrefillTiles {
  Divisor page_size;
  DecodePlan plan;

  explicit PrefillTiles(const Problem& problem)
      : page_size(static_cast<uint32_t>(problem.cache.page_size)), plan(decode_plan(problem)) {}

  FLASHTILE_DEVICE RowBlock tile(const ForwardSm90Params& params, int index, int block) const {
    RowBlock tile =
        query_block(params.problem, index, params.query_blocks, block, cache_sequence_of);
    if (plan.serves(tile.sequence.seqlen_q)) tile.owned = 0;
    return tile;
  }
};

struct PageBoxesParams : TensorBoxesParams {
  PrefillTiles tiles_of;
  int32_t box_rows;  // of a piece: page_box_rows()
};

// Rows that lie on one page wherever a block begins: divides a page and a block. Without a table a
// sequence has one page, and may end anywhere on it.
inline int page_box_rows(const Cache& cache, int block_rows) {
  if (cache.block_table == nullptr) return block_rows;
  return static_cast<int>(std::gcd(cache.page_size, int64_t{block_rows}));
}

// What both ways to load have in common: whole warps load, and a thread block has one tile.
struct PageSource {
  int sequence;
  int head;
  int count;  // keys of the sequence
  int begin;  // blocks from here on are loaded

  FLASHTILE_DEVICE static bool takes_part() { return true; }
  FLASHTILE_DEVICE static bool leads() { return ptx::thread_index() == 0; }
  FLASHTILE_DEVICE static int tile_after(int) { return INT32_MAX; }
  template <class Params>
  FLASHTILE_DEVICE static RowBlock query_block(const Params& params, int index, int block) {
    return params.tiles_of.tile(params, index, block);
  }

  FLASHTILE_DEVICE PageSource(const Problem& problem, const RowBlock& work, const BlockRange& range)
      : sequence(static_cast<int>(work.sequence.index)),
        head(key_head(problem, work.head)),
        count(work.sequence.seqlen_k),
        begin(range.begin) {}
};

// A warp loads a block, each lane another piece of it.
template <class Tile>
struct PageBoxes : PageSource {
  using Params = PageBoxesParams;
  static constexpr int kWarps = 1;
  static constexpr int kArrivals = 1;
  static_assert(Tile::kRows / kPageBoxRows <= 32, "a lane has one piece");
  int piece;     // this lane's first row of a block
  TmaRows rows;  // of this lane's piece of the block that is loaded next

  FLASHTILE_DEVICE static void prefetch_maps(const Params& params) {
    TensorBoxes<Tile>::prefetch_maps(params);
  }

  FLASHTILE_DEVICE PageBoxes(const Params& params, const RowBlock& work, const BlockRange& range)
      : PageSource(params.problem, work, range),
        piece(ptx::thread_index() * params.box_rows),
        rows(find(params, range.end - 1)) {}

  template <class Shared>
  FLASHTILE_DEVICE void load(const Params& params, const Shared& shared, int block, int use) {
    load(params, params.k, shared.k(use), shared.k_ring(), use);
    load(params, params.v, shared.v(use), shared.v_ring(), use);
    rows = find(params, block - 1);  // now: the table answers while buffers are waited for
  }
  FLASHTILE_DEVICE void finish() {}

 private:
  template <class Ring>
  FLASHTILE_DEVICE void load(const Params& params, const TensorMap& map, uint32_t tile,
                             const Ring& ring, int use) const {
    if (leads()) ring.acquire(use, Tile::kBytes);
    __syncwarp();  // the buffer is free and expects these bytes
    if (piece >= Tile::kRows) return;
    FLASHTILE_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::tma_load(tile + panel * Tile::kPanelBytes + piece * kPanelRowBytes, map, ring.full(use),
                    coordinates(rows, params.box_rows, panel));
    }
  }

  // Nothing is looked up for rows that the sequence does not have.
  FLASHTILE_DEVICE TmaRows find(const Params& params, int block) const {
    TmaRows found = {0, 0, head, 0};
    const int key = block * Tile::kRows + piece;
    if (block < begin || piece >= Tile::kRows || key >= count) return found;
    const CachePlace place =
        cache_place(params.problem.cache, params.tiles_of.page_size, sequence, key);
    found.row = place.row;
    found.count = count - key;
    found.batch = place.page;
    return found;
  }
};

struct PageBoxKeys : TensorKeys90 {
  template <class Tile>
  using Source = PageBoxes<Tile>;
};

}  // namespace flashtile
