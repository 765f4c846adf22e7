// Rows of a tensor between global memory and the panels of a tile, by the maps of
// cuda/tensor_map.h.
#pragma once

#include "../ptx/tma.cuh"
#include "smem_tile.cuh"
#include "work.cuh"

namespace flashtile {

// Which rows: `count` of them from `row` on, of one head; rows of the box past `count` do not
// exist.
struct TmaRows {
  int row, count, head, batch;
};

FLASHTILE_DEVICE ptx::Coordinates coordinates(const TmaRows& rows, int box_rows, int panel) {
  const int count = min(max(rows.count, 0), box_rows);
  return {panel * kPanelCols, box_rows - count, rows.row + count, rows.head, rows.batch};
}

// All rows of a tile, on `barrier`: Tile::kBytes, of which rows that do not exist are zeros.
template <class Tile>
FLASHTILE_DEVICE void load_tile(uint32_t tile, const TensorMap& map, uint32_t barrier,
                                const TmaRows& rows) {
  FLASHTILE_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(tile + panel * Tile::kPanelBytes, map, barrier,
                  coordinates(rows, Tile::kRows, panel));
  }
}

// Rows [tile_row, tile_row + kBoxRows) of a tile to global memory.
template <class Tile, int kBoxRows>
FLASHTILE_DEVICE void store_tile(const TensorMap& map, uint32_t tile, int tile_row,
                                 const TmaRows& rows) {
  FLASHTILE_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_store(map, tile + panel * Tile::kPanelBytes + tile_row * kPanelRowBytes,
                   coordinates(rows, kBoxRows, panel));
  }
}

}  // namespace flashtile
