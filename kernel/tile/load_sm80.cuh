// Copies tiles from global to shared memory with cp.async, all threads of a block together.
//
// Rows that fill the tile and are 16-byte aligned take straight-line code; all others one rolled
// loop, whose chunks end where the row ends (row_format.cuh).
//
// Four threads share a row: each moves every fourth 16-byte chunk, so that a thread needs one
// pointer and few sums, and the chunks of a row are immediates of the instruction. Eight
// neighbouring threads, whose 16 bytes go to shared memory at once, take two rows whose chunks the
// swizzle puts into different banks: r and r + 4, or r and r + 1 in panels of 32 columns.
#pragma once

#include "../ptx/ampere.cuh"
#include "row_format.cuh"
#include "smem_tile.cuh"

namespace flashtile {

inline constexpr int kThreadsPerRow = 4;
inline constexpr int kChunkStep = kThreadsPerRow * kChunkBytes;  // between a thread's chunks

// Row of a thread in a pass over the tile. Of every eight rows, in the order of threads: 0 4 1 5 2
// 6 3 7 in panels of 64 columns.
template <class Tile>
FLASHTILE_HOST_DEVICE int load_row(int thread) {
  const int group = thread / kThreadsPerRow;
  return Tile::kPanelCols == 64 ? group / 8 * 8 + group % 2 * 4 + group % 8 / 2 : group;
}

// A thread's 16-byte chunks of a tile in shared memory. Tiles of one shape share it: `tile_bytes`
// is then an immediate.
template <class Tile, int kThreads>
struct LoadTarget {
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr int kPasses = (Tile::kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kChunks = Tile::kCols / 8 / kThreadsPerRow;  // of a row, per thread
  static_assert(kRowsPerPass % 8 == 0);

  // Chunks t and t + 4 of a panel, which differ by an XOR of 64 bytes; only t in narrow panels.
  static constexpr int kPerPanel = Tile::kPanelChunks / kThreadsPerRow;
  uint32_t base[kPerPanel];

  FLASHTILE_DEVICE LoadTarget(uint32_t tile, int thread) {
    const uint32_t first = tile + Tile::offset(load_row<Tile>(thread), thread % kThreadsPerRow);
    FLASHTILE_UNROLL
    for (int i = 0; i < kPerPanel; ++i) {
      base[i] = first ^ i * kChunkStep;
      ptx::opaque(base[i]);
    }
  }

  FLASHTILE_DEVICE uint32_t at(int pass, int chunk) const {
    return base[chunk % kPerPanel] + chunk / kPerPanel * Tile::kPanelBytes +
           pass * kRowsPerPass * Tile::kPanelRowBytes;
  }
};

// A thread's place in global memory: walks backwards over the rows of one head.
template <class Tile, int kThreads>
struct TileLoader {
  using Target = LoadTarget<Tile, kThreads>;
  static constexpr bool kWholePasses = Tile::kRows % Target::kRowsPerPass == 0;

  const char* source;  // this thread's first chunk in its first row of the tile loaded last
  int64_t pass_bytes;  // from row r to row r + kRowsPerPass

  // The first load brings the tile that ends where `end_row` (its column 0) begins. `stride` in
  // elements.
  FLASHTILE_DEVICE TileLoader(const void* end_row, int64_t stride, int thread) {
    source = static_cast<const char*>(end_row) + load_row<Tile>(thread) * stride * 2 +
             thread % kThreadsPerRow * kChunkBytes;
    pass_bytes = stride * 2 * Target::kRowsPerPass;
  }

  // The tile before. All its rows exist; `fills`: fills_tile().
  template <int kTileBytes = 0>
  FLASHTILE_DEVICE void load_whole(const Target& target, const RowFormat& format, bool fills) {
    if (fills) {
      copy_whole<kTileBytes>(target, [](uint32_t shared, const char* global, int) {
        ptx::cp_async_16(shared, global);
      });
    } else if (format.unit == kChunkBytes) {
      const int bytes = format.bytes - first_column();
      copy_whole<kTileBytes>(target, [=](uint32_t shared, const char* global, int step) {
        ptx::cp_async_16_or_zero(shared, global, step < bytes);
      });
    } else {
      load<kTileBytes>(target, format, Tile::kRows);
    }
  }

  // The tile before. Rows from `rows` on do not exist: they become zeros, as do the columns past
  // the end of a row. Neither is read.
  template <int kTileBytes = 0>
  FLASHTILE_DEVICE void load(const Target& target, const RowFormat& format, int rows) {
    FLASHTILE_ROLL
    for (int pass = Target::kPasses - 1; pass >= 0; --pass) {
      step_back();
      const uint32_t shared = target.at(pass, 0) + kTileBytes;
      const int row = load_row<Tile>(ptx::thread_index()) + pass * Target::kRowsPerPass;
      copy_row(shared, source, row < rows ? format.bytes - first_column() : 0, format.unit);
    }
  }

  // This thread's chunks of one row, of which `bytes` exist from the first one on; zeros follow.
  FLASHTILE_DEVICE static void copy_row(uint32_t shared, const char* row, int bytes, int unit) {
    if (unit == kChunkBytes) {
      copy_row_16(shared, row, bytes);
    } else {
      copy_row_narrow(shared, row, bytes, unit);
    }
  }
  // Of this thread, in bytes.
  FLASHTILE_DEVICE static int first_column() {
    return (ptx::thread_index() & (kThreadsPerRow - 1)) * kChunkBytes;
  }

 private:
  FLASHTILE_DEVICE void step_back() {
    static_assert(kWholePasses);
    source -= pass_bytes;
    ptx::opaque(source);
  }

  template <int kTileBytes, class Copy>
  FLASHTILE_DEVICE void copy_whole(const Target& target, const Copy& copy) {
    FLASHTILE_UNROLL
    for (int pass = Target::kPasses - 1; pass >= 0; --pass) {
      step_back();
      FLASHTILE_UNROLL
      for (int chunk = 0; chunk < Target::kChunks; ++chunk) {
        const int step = chunk * kChunkStep;
        copy(target.at(pass, chunk) + kTileBytes, source + step, step);
      }
    }
  }

  FLASHTILE_DEVICE static void copy_row_16(uint32_t shared, const char* row, int bytes) {
    FLASHTILE_UNROLL
    for (int chunk = 0; chunk < Target::kChunks; ++chunk) {
      const int step = chunk * kChunkStep;
      ptx::cp_async_16_or_zero(chunk_address(shared, chunk), row + step, step < bytes);
    }
  }
  FLASHTILE_DEVICE static void copy_row_narrow(uint32_t shared, const char* row, int bytes,
                                               int unit) {
    FLASHTILE_ROLL
    for (int chunk = 0; chunk < Target::kChunks; ++chunk) {
      const int step = chunk * kChunkStep;
      copy_narrow(chunk_address(shared, chunk), row + step, bytes - step, unit);
    }
  }
  FLASHTILE_DEVICE static uint32_t chunk_address(uint32_t shared, int chunk) {
    return (shared ^ chunk % Target::kPerPanel * kChunkStep) +
           chunk / Target::kPerPanel * Tile::kPanelBytes;
  }
};

// Flips the sign of the chunks that this thread has copied; they have landed.
template <class Tile, int kThreads>
FLASHTILE_DEVICE void negate(const LoadTarget<Tile, kThreads>& target) {
  FLASHTILE_UNROLL
  for (int pass = 0; pass < target.kPasses; ++pass) {
    FLASHTILE_UNROLL
    for (int chunk = 0; chunk < target.kChunks; ++chunk) negate_chunk(target.at(pass, chunk));
  }
}

}  // namespace flashtile
