// The two products of attention on one warpgroup: 64 rows, each warp 16 of them. Asynchronous: the
// caller puts ptx::wgmma_fence() before and ptx::wgmma_commit() and a wait behind.
#pragma once

#include "../ptx/wgmma.cuh"
#include "accumulator.cuh"
#include "smem_tile.cuh"

namespace flashtile {

// Lower descriptor words of a tile, from a row on (a multiple of 8). Offsets are added to them as
// bytes / 16.
template <class Tile>
FLASHTILE_DEVICE uint32_t tile_descriptor(uint32_t tile, int row = 0) {
  return ptx::descriptor_low(tile + row * kPanelRowBytes, Tile::kPanelBytes);
}

// c = A B^T for A [64, d] and B [n, d], both with d contiguous.
template <class T, class TileA, class TileB>
FLASHTILE_DEVICE void issue_ABt(Accumulator<16, TileB::kRows>& c, uint32_t a, uint32_t b) {
  static_assert(TileA::kCols == TileB::kCols);
  FLASHTILE_UNROLL
  for (int step = 0; step < TileA::kCols / 16; ++step) {
    const uint32_t in_panel = step % 4 * 32 / 16;
    const uint32_t at_a = a + step / 4 * (TileA::kPanelBytes / 16) + in_panel;
    const uint32_t at_b = b + step / 4 * (TileB::kPanelBytes / 16) + in_panel;
    ptx::wgmma<T, ptx::Major::kK, ptx::Major::kK>(c.d[0], ptx::descriptor(at_a),
                                                  ptx::descriptor(at_b), step > 0);
  }
}

// c += A B for A [64, n] in registers, 16 columns each, and B [n, d] with d contiguous.
template <class T, class TileB>
FLASHTILE_DEVICE void issue_AB(Accumulator<16, TileB::kCols>& c,
                               const uint32_t (&a)[TileB::kRows / 16][4], uint32_t b) {
  FLASHTILE_UNROLL
  for (int step = 0; step < TileB::kRows / 16; ++step) {
    const uint32_t at_b = b + step * (16 * kPanelRowBytes / 16);
    ptx::wgmma<T, ptx::Major::kMn>(c.d[0], a[step], ptx::descriptor(at_b), true);
  }
}

}  // namespace flashtile
