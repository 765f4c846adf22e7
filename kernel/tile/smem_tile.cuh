// A tile in shared memory: [rows, cols] of 16-bit elements, and the addresses a lane uses in it.
//
// Columns are cut into panels of 64 (or of 32, where 64 would leave one half used), stored one
// after another. Inside a panel the eight (four) 16-byte chunks of a row are permuted by the row,
// so that eight rows of one logical chunk (what one ldmatrix phase reads) lie in eight different
// bank groups:
//
//   byte = panel * rows * 128 + row * 128 + ((chunk ^ (row % 8)) * 16)
//   byte = panel * rows * 64 + row * 64 + ((chunk ^ (row / 2 % 4)) * 16)
//
// They are the permutations of TMA's 128-byte and 64-byte swizzles. Tiles start at multiples of
// 1024 bytes.
#pragma once

#include "../ptx/common.cuh"

namespace flashtile {

inline constexpr int kChunkBytes = 16;  // one cp.async, one row of an ldmatrix matrix

// Columns of a panel in a tile of `cols` columns.
FLASHTILE_HOST_DEVICE int panel_cols(int cols) { return cols % 64 == 0 ? 64 : 32; }

template <int kRowsValue, int kColsValue, int kPanelColsValue = panel_cols(kColsValue)>
struct SmemTile {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kPanelCols = kPanelColsValue;
  static constexpr int kPanelChunks = kPanelCols / 8;
  static constexpr int kPanelBlocks = kPanelCols / 16;  // of 16 columns
  static constexpr int kPanelRowBytes = 2 * kPanelCols;
  static constexpr int kPanels = (kCols + kPanelCols - 1) / kPanelCols;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kCols % 32 == 0 && kRows % 8 == 0);

  // Byte offset of 16-byte chunk `chunk` (0 .. kCols / 8 - 1) of row `row`.
  static FLASHTILE_HOST_DEVICE uint32_t offset(int row, int chunk) {
    constexpr int kRowsPerLine = 128 / kPanelRowBytes;  // of all 32 banks
    return chunk / kPanelChunks * kPanelBytes + row * kPanelRowBytes +
           ((chunk ^ row / kRowsPerLine) % kPanelChunks * kChunkBytes);
  }
};

// What TMA fills and wgmma reads: always in panels of 64 columns, of which the last may be half
// used.
inline constexpr int kPanelCols = 64;
inline constexpr int kPanelRowBytes = 128;
template <int kRows, int kCols>
using WideTile = SmemTile<kRows, kCols, kPanelCols>;

// Flips the signs of a chunk.
FLASHTILE_DEVICE void negate_chunk(uint32_t address) {
  constexpr uint32_t kSigns = 0x80008000;  // of two 16-bit floats
  const uint4 x = ptx::lds_u32x4(address);
  ptx::sts_u32x4(address, make_uint4(x.x ^ kSigns, x.y ^ kSigns, x.z ^ kSigns, x.w ^ kSigns));
}

// Which row and chunk of a 16 x 16 block a lane addresses in ldmatrix_x4.
//   kRowsFirst: matrices (rows 0-7, cols 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15):
//               an A operand, or with _trans the B operands of two n8 tiles stored [k, n].
//   kColsFirst: matrices (0-7, 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15):
//               the B operands of two n8 tiles stored [n, k], or with _trans an A operand stored
//               [k, m].
enum class Lanes { kRowsFirst, kColsFirst };

FLASHTILE_HOST_DEVICE int lane_row(Lanes lanes, int lane) {
  return lanes == Lanes::kRowsFirst ? lane % 16 : lane % 8 + lane / 16 * 8;
}
FLASHTILE_HOST_DEVICE int lane_chunk(Lanes lanes, int lane) {
  return lanes == Lanes::kRowsFirst ? lane / 16 : lane / 8 % 2;
}

// How warps share the columns of a tile of kHeadDim columns: each takes an equal part of every
// panel, so that its 16 x 16 blocks lie at constant distances from the first one.
template <int kHeadDim, int kParts>
struct ColumnSplit {
  static constexpr int kPanelCols = panel_cols(kHeadDim);
  static constexpr int kPart = kPanelCols / kParts;
  static constexpr int kCols = kHeadDim / kParts;  // of one warp
  static constexpr int kBlocksPerPanel = kPart / 16;
  static_assert(kPart % 16 == 0 && kPart * kParts == kPanelCols);

  // 16-byte chunk of part `part`'s first column.
  static FLASHTILE_HOST_DEVICE int first_chunk(int part) { return part * kPart / 8; }
  static FLASHTILE_HOST_DEVICE int part(int col) { return col % kPanelCols / kPart; }
  // Column `col` among those of its part.
  static FLASHTILE_HOST_DEVICE int col_in_part(int col) {
    return col / kPanelCols * kPart + col % kPart;
  }
};

// A lane's addresses of the 16 x 16 blocks of a tile, or of one part of its columns (of kParts, see
// ColumnSplit), from row `row0` (a multiple of 8) down. The blocks of a panel differ by an XOR of
// 32, 64, 96 bytes; panels and rows are immediates of the instruction.
//
// kRegisters: one for every block of a panel, or 1, from which each use works out its block: a loop
// with no register to spare pays an instruction instead.
template <class TileValue, int kRegisters = TileValue::kPanelBlocks, int kParts = 1>
struct LaneAddress {
  using Tile = TileValue;
  static constexpr int kBlocks = Tile::kPanelBlocks / kParts;
  static_assert(kBlocks % kRegisters == 0);
  uint32_t base[kRegisters];

  FLASHTILE_DEVICE LaneAddress(uint32_t tile, Lanes lanes, int lane, int row0 = 0, int chunk0 = 0) {
    const uint32_t first =
        tile + Tile::offset(row0 + lane_row(lanes, lane), chunk0 + lane_chunk(lanes, lane));
    FLASHTILE_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      base[i] = first ^ (i * 2 * kChunkBytes);
      if (kRegisters > 1) ptx::opaque(base[i]);
    }
  }

  FLASHTILE_DEVICE void move(int bytes) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kRegisters; ++i) base[i] += bytes;
  }
  // The same in a tile that lies `bytes`, a multiple of 1024, behind this one.
  FLASHTILE_DEVICE LaneAddress behind(uint32_t bytes) const {
    LaneAddress other = *this;
    other.move(bytes);
    return other;
  }
  // Keeps the compiler from working out, ahead of a loop, what follows from the address.
  FLASHTILE_DEVICE void opaque() {
    FLASHTILE_UNROLL
    for (int i = 0; i < kRegisters; ++i) ptx::opaque(base[i]);
  }

  // The block at rows row0 + row, columns 16 * column_block, `bytes` further on.
  FLASHTILE_DEVICE uint32_t at(int row, int column_block, int bytes = 0) const {
    const int block = column_block % kBlocks;
    return (base[block % kRegisters] ^ (block / kRegisters * kRegisters * 2 * kChunkBytes)) +
           column_block / kBlocks * Tile::kPanelBytes + row * Tile::kPanelRowBytes + bytes;
  }
};

}  // namespace flashtile
