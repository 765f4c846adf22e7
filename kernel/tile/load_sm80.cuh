// Copies tiles from global to shared memory with cp.async, all threads of a block together.
//
// Four threads share a row: each moves every fourth 16-byte chunk, so that a thread needs one
// pointer and few sums, and the chunks of a row are immediates of the instruction. Eight
// neighbouring threads, whose 16 bytes go to shared memory at once, take rows r and r + 4: the
// swizzle puts their chunks into different banks.
#pragma once

#include "../ptx/ampere.cuh"
#include "smem_tile.cuh"

namespace flashtile {

inline constexpr int kThreadsPerRow = 4;

// Row of a thread in a pass over the tile. Of every eight rows, in the order of threads: 0 4 1 5 2
// 6 3 7.
FLASHTILE_HOST_DEVICE int load_row(int thread) {
  const int group = thread / kThreadsPerRow;
  return group / 8 * 8 + group % 2 * 4 + group % 8 / 2;
}

// A thread's 16-byte chunks of a tile in shared memory. Tiles of one shape share it: `tile_bytes`
// is then an immediate.
template <class Tile, int kThreads>
struct LoadTarget {
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kChunks = Tile::kCols / 8 / kThreadsPerRow;  // of a row, per thread
  static_assert(Tile::kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);

  uint32_t base[2];  // chunks t and t + 4 of a panel, which differ by an XOR of 64 bytes

  FLASHTILE_DEVICE LoadTarget(uint32_t tile, int thread) {
    base[0] = tile + Tile::offset(load_row(thread), thread % kThreadsPerRow);
    base[1] = base[0] ^ (kThreadsPerRow * kChunkBytes);
    ptx::hide(base[0]);
    ptx::hide(base[1]);
  }

  FLASHTILE_DEVICE uint32_t at(int pass, int chunk) const {
    return base[chunk % 2] + chunk / 2 * Tile::kPanelBytes + pass * kRowsPerPass * kPanelRowBytes;
  }
};

// A thread's place in global memory: walks backwards over the tiles of one head.
template <class Tile, int kThreads>
struct TileLoader {
  using Target = LoadTarget<Tile, kThreads>;

  const char* source;  // this thread's first chunk in the current tile
  int64_t pass_bytes;  // from row r to row r + kRowsPerPass
  int row;             // this thread's first row in the tile

  // `first_row`: the tile's row 0, column 0. Rows are 16-byte aligned, `stride` is in elements.
  FLASHTILE_DEVICE TileLoader(const void* first_row, int64_t stride, int thread) {
    row = load_row(thread);
    source = static_cast<const char*>(first_row) + row * stride * 2 +
             thread % kThreadsPerRow * kChunkBytes;
    pass_bytes = stride * 2 * Target::kRowsPerPass;
  }

  FLASHTILE_DEVICE void step_back() {
    source -= pass_bytes * Target::kPasses;
    ptx::hide(source);
  }

  // All rows of the tile exist.
  template <int kTileBytes = 0>
  FLASHTILE_DEVICE void load(const Target& target) const {
    copy<kTileBytes>(
        [&](uint32_t shared, const char* global, int) { ptx::cp_async_16(shared, global); },
        target);
  }

  // Rows from `rows` on do not exist: they become zeros, and are not read.
  template <int kTileBytes = 0>
  FLASHTILE_DEVICE void load_ragged(const Target& target, int rows) const {
    copy<kTileBytes>([&](uint32_t shared, const char* global,
                         int tile_row) { ptx::cp_async_16(shared, global, tile_row < rows); },
                     target);
  }

 private:
  template <int kTileBytes, class Copy>
  FLASHTILE_DEVICE void copy(const Copy& copy_16, const Target& target) const {
    const char* row_source = source;
    FLASHTILE_UNROLL
    for (int pass = 0; pass < Target::kPasses; ++pass) {
      FLASHTILE_UNROLL
      for (int chunk = 0; chunk < Target::kChunks; ++chunk) {
        copy_16(target.at(pass, chunk) + kTileBytes,
                row_source + chunk * kThreadsPerRow * kChunkBytes,
                row + pass * Target::kRowsPerPass);
      }
      row_source += pass_bytes;
    }
  }
};

// Flips the sign of the chunks that this thread has copied; they have landed.
template <class Tile, int kThreads>
FLASHTILE_DEVICE void negate(const LoadTarget<Tile, kThreads>& target) {
  constexpr uint32_t kSigns = 0x80008000;  // of two 16-bit floats
  FLASHTILE_UNROLL
  for (int pass = 0; pass < target.kPasses; ++pass) {
    FLASHTILE_UNROLL
    for (int chunk = 0; chunk < target.kChunks; ++chunk) {
      const uint4 x = ptx::lds_u32x4(target.at(pass, chunk));
      ptx::sts_u32x4(target.at(pass, chunk),
                     make_uint4(x.x ^ kSigns, x.y ^ kSigns, x.z ^ kSigns, x.w ^ kSigns));
    }
  }
}

}  // namespace flashtile
