// The products of attention on one warpgroup: 64 rows, each warp 16 of them. Asynchronous: the
// caller puts ptx::wgmma_fence() before and ptx::wgmma_commit() and a wait behind.
#pragma once

#include "../ptx/wgmma.cuh"
#include "accumulator.cuh"
#include "smem_tile.cuh"

namespace flashtile {

// Lower descriptor words: of a tile, from a row on (a multiple of 8). Offsets are added to them as
// bytes / 16.
template <class Tile>
FLASHTILE_DEVICE uint32_t tile_descriptor(uint32_t tile, int row = 0) {
  return ptx::descriptor_low(tile + row * kPanelRowBytes, Tile::kPanelBytes);
}

// The same of all tiles in one block of shared memory, in one register: a tile's word differs from
// the block's own by a constant and by its stage.
struct TileDescriptors {
  uint32_t origin;

  FLASHTILE_DEVICE explicit TileDescriptors(uint32_t smem) : origin(ptx::descriptor_low(smem, 0)) {}
  // Tile `stage` of those that begin `offset` bytes behind the block's first.
  template <class Tile>
  FLASHTILE_DEVICE uint32_t at(int offset, int stage = 0) const {
    return origin + offset / 16 + (Tile::kPanelBytes / 16 << 16) + stage * (Tile::kBytes / 16);
  }
};

// 16 columns at a time along the rows of a tile, and 16 rows at a time down its columns.
template <class Tile>
FLASHTILE_DEVICE uint64_t along_rows(uint32_t tile, int step) {
  return ptx::descriptor(tile + (step / 4 * Tile::kPanelBytes + step % 4 * 32) / 16);
}
FLASHTILE_DEVICE uint64_t down_columns(uint32_t tile, int step) {
  return ptx::descriptor(tile + step * (16 * kPanelRowBytes / 16));
}

// c = A B^T, or c += A B^T, for A [64, d] and B [n, d], both with d contiguous.
template <class T, class TileA, class TileB, bool kAdd = false>
FLASHTILE_DEVICE void issue_ABt(Accumulator<16, TileB::kRows>& c, uint32_t a, uint32_t b) {
  static_assert(TileA::kCols == TileB::kCols);
  FLASHTILE_UNROLL
  for (int step = 0; step < TileA::kCols / 16; ++step) {
    ptx::wgmma<T, ptx::Major::kK, ptx::Major::kK>(c.d[0], along_rows<TileA>(a, step),
                                                  along_rows<TileB>(b, step), kAdd || step > 0);
  }
}

// c += A B for A [64, n] in registers, 16 columns each, and B [n, d] with d contiguous.
template <class T, class TileB>
FLASHTILE_DEVICE void issue_AB(Accumulator<16, TileB::kCols>& c,
                               const uint32_t (&a)[TileB::kRows / 16][4], uint32_t b) {
  FLASHTILE_UNROLL
  for (int step = 0; step < TileB::kRows / 16; ++step)
    ptx::wgmma<T, ptx::Major::kMn>(c.d[0], a[step], down_columns(b, step), true);
}

// c = A B for A [64, n] with n contiguous and columns of B [n, d] with d contiguous.
template <class T, class TileA, class TileB, int kCols>
FLASHTILE_DEVICE void issue_AB(Accumulator<16, kCols>& c, uint32_t a, uint32_t b) {
  static_assert(TileA::kCols == TileB::kRows);
  FLASHTILE_UNROLL
  for (int step = 0; step < TileA::kCols / 16; ++step) {
    ptx::wgmma<T, ptx::Major::kK, ptx::Major::kMn>(c.d[0], along_rows<TileA>(a, step),
                                                   down_columns(b, step), step > 0);
  }
}

}  // namespace flashtile
