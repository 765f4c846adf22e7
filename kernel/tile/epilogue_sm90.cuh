// A warpgroup's rows in registers and in a tile of shared memory that TMA stores from or has
// loaded.
#pragma once

#include "../ptx/hopper.cuh"
#include "accumulator.cuh"
#include "smem_tile.cuh"

namespace flashtile {

// Rows lane / 4 and lane / 4 + 8 of each warp, times their factors.
template <int kCols>
FLASHTILE_DEVICE void scale_rows(Accumulator<16, kCols>& x, const float (&factor)[2]) {
  for_each(x, [&](float& d, int, int, int i) { d *= factor[i / 2]; });
}

// x, rounded to T, into the warp's rows of a tile.
template <class T, class Tile, int kCols>
FLASHTILE_DEVICE void store_fragments(uint32_t tile, int row0, int lane,
                                      const Accumulator<16, kCols>& x) {
  const LaneAddress<Tile> rows(tile, Lanes::kRowsFirst, lane, row0);
  FLASHTILE_UNROLL
  for (int k = 0; k < kCols / 16; ++k) {
    uint32_t fragment[4];
    to_operand<T>(fragment, x, 0, k);
    ptx::stmatrix_x4(rows.at(0, k), fragment);
  }
}

// Flips the signs of a warpgroup's 64 rows of a tile that has landed, before its products read
// them.
template <class Tile>
FLASHTILE_DEVICE void negate_rows(uint32_t tile, int warpgroup, int barrier) {
  constexpr int kPanelChunks = 64 * kPanelRowBytes / kChunkBytes;
  const int thread = ptx::thread_index() % 128;
  const uint32_t rows = tile + warpgroup * 64 * kPanelRowBytes;
  FLASHTILE_ROLL
  for (int i = thread; i < Tile::kPanels * kPanelChunks; i += 128)
    negate_chunk(rows + i / kPanelChunks * Tile::kPanelBytes + i % kPanelChunks * kChunkBytes);
  ptx::fence_proxy_async_shared();
  ptx::named_barrier_sync(barrier, 128);  // the signs are there, also for the products
}

}  // namespace flashtile
