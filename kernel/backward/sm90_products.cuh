// Products of the sm_90a backward that the forward has not: one that starts from values and one
// whose rows are in shared memory. Asynchronous, as in tile/product_sm90.cuh.
#pragma once

#include "tile/product_sm90.cuh"

namespace flashtile {

// Lower descriptor words of tiles in one block of shared memory: what a tile has not in common with
// the block's own word is a constant, but for the stage.
struct TileDescriptors {
  uint32_t origin;

  FLASHTILE_DEVICE explicit TileDescriptors(uint32_t smem) : origin(ptx::descriptor_low(smem, 0)) {}
  // `offset`: bytes from the block to the tile's first row.
  template <class Tile>
  FLASHTILE_DEVICE uint32_t at(int offset) const {
    return origin + offset / 16 + (Tile::kPanelBytes / 16 << 16);
  }
  // Tile `stage` of those that begin at `offset`.
  template <class Tile>
  FLASHTILE_DEVICE uint32_t at_stage(int offset, int stage) const {
    return at<Tile>(offset) + stage * (Tile::kBytes / 16);
  }
};

// Lower descriptor word, 16 columns at a time along the rows of a tile, and 16 rows down.
template <class Tile>
FLASHTILE_DEVICE uint32_t along_rows(uint32_t tile, int step) {
  return tile + (step / 4 * Tile::kPanelBytes + step % 4 * 32) / 16;
}
FLASHTILE_DEVICE uint32_t down_columns(uint32_t tile, int step) {
  return tile + step * (16 * kPanelRowBytes / 16);
}

// c += A B^T for A [64, d] and B [n, d], both with d contiguous.
template <class T, class TileA, class TileB>
FLASHTILE_DEVICE void issue_add_ABt(Accumulator<16, TileB::kRows>& c, uint32_t a, uint32_t b) {
  static_assert(TileA::kCols == TileB::kCols);
  FLASHTILE_UNROLL
  for (int step = 0; step < TileA::kCols / 16; ++step) {
    ptx::wgmma<T, ptx::Major::kK, ptx::Major::kK>(
        c.d[0], ptx::descriptor(along_rows<TileA>(a, step)),
        ptx::descriptor(along_rows<TileB>(b, step)), true);
  }
}

// c = A B for A [64, n] with n contiguous and columns of B [n, d] with d contiguous.
template <class T, class TileA, class TileB, int kCols>
FLASHTILE_DEVICE void issue_shared_AB(Accumulator<16, kCols>& c, uint32_t a, uint32_t b) {
  static_assert(TileA::kCols == TileB::kRows);
  FLASHTILE_UNROLL
  for (int step = 0; step < TileA::kCols / 16; ++step) {
    ptx::wgmma<T, ptx::Major::kK, ptx::Major::kMn>(
        c.d[0], ptx::descriptor(along_rows<TileA>(a, step)), ptx::descriptor(down_columns(b, step)),
        step > 0);
  }
}

}  // namespace flashtile
