// Stores a warp's fp32 tile as 16-bit rows: through shared memory, so that global stores are 16
// bytes per lane and whole rows per warp.
#pragma once

#include "accumulator.cuh"
#include "load_sm80.cuh"
#include "row_format.cuh"
#include "smem_tile.cuh"

namespace flashtile {

// A warp's x, rounded to T, into a tile: rows from `row0` on, the columns of part `part` of kParts
// (ColumnSplit). factor(m, half) is what a lane's row is multiplied with first.
template <class T, class Tile, int kParts = 1, int kRows, int kCols, class Factor>
FLASHTILE_DEVICE void store_shared(uint32_t tile, int row0, int lane,
                                   const Accumulator<kRows, kCols>& x, const Factor& factor,
                                   int part = 0) {
  constexpr int kPerPanel = Tile::kPanelChunks / kParts;
  const uint32_t address = tile + Tile::offset(row0 + lane / 4, part * kPerPanel) + lane % 4 * 4;
  FLASHTILE_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      const uint32_t block = (address ^ (n % kPerPanel * kChunkBytes)) +
                             n / kPerPanel * Tile::kPanelBytes + 16 * m * Tile::kPanelRowBytes;
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float f = factor(m, half);
        ptx::sts_u32(block + 8 * half * Tile::kPanelRowBytes,
                     ptx::pack<T>(x.d[m][n][2 * half] * f, x.d[m][n][2 * half + 1] * f));
      }
    }
  }
}

// Rows of a tensor in global memory, from a tile's row 0 on.
struct GlobalRows {
  char* first;
  int64_t stride;  // elements
  int count;       // rows that exist
  RowFormat format;
};

// The warp's rows [row0, row0 + kRows) of the tile to global memory. Lanes share rows as in
// load_row().
template <class Tile, int kRows>
FLASHTILE_DEVICE void store_global(const GlobalRows& rows, uint32_t tile, int row0, int lane) {
  constexpr int kRowsPerPass = 32 / kThreadsPerRow;
  const int column = lane % kThreadsPerRow;  // chunks
  const bool fills = fills_tile(rows.format, Tile::kCols);
  FLASHTILE_ROLL
  for (int i = 0; i < kRows; i += kRowsPerPass) {
    const int row = row0 + i + load_row<Tile>(lane);
    if (row >= rows.count) continue;
    char* const target = rows.first + row * rows.stride * 2;
    FLASHTILE_UNROLL
    for (int c = 0; c < Tile::kCols / 8; c += kThreadsPerRow) {
      const int chunk = column + c;
      const uint4 x = ptx::lds_u32x4(tile + Tile::offset(row, chunk));
      char* const place = target + chunk * kChunkBytes;
      if (fills) {
        *reinterpret_cast<uint4*>(place) = x;
      } else {
        store_chunk(place, x, rows.format.bytes - chunk * kChunkBytes, rows.format.unit);
      }
    }
  }
}

}  // namespace flashtile
