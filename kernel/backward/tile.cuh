// The pieces of the mma.sync backward's main loop: shared memory, copies, addresses, products.
#pragma once

#include "backward/layout.cuh"
#include "backward/notes.cuh"
#include "backward/transposed_scores.cuh"
#include "tile/product_sm80.cuh"

namespace flashtile {

// The notes of a thread block (backward/notes.cuh).
struct EdgeNotes {
  int diagonal;      // first query that sees the block's first key; may be negative
  unsigned queries;  // that see a key: from the first on
  int keys;          // of the block, in use
  int unused = 0;
  static constexpr int kOffset = 0;
};
struct QueryNotes {
  int seqlen_q;
  int end;        // one past the last block of queries to visit
  int clean_end;  // one past the slot (of the workspace) of the head's last clean block
  int unused = 0;
  static constexpr int kOffset = 16;
  // Alone: it is read in every step.
  static FLASHTILE_DEVICE int read_clean_end(uint32_t address) {
    return static_cast<int>(ptx::lds_u32(address + kOffset + 8));
  }
};
struct TurnNotes {
  int own;     // which of TurnWords says how far this block of keys has come
  int before;  // and which how far the one before has
  int unused[2] = {};
  static constexpr int kOffset = 32;
  // One word alone: each is read in every step.
  static FLASHTILE_DEVICE int read_own(uint32_t address) {
    return static_cast<int>(ptx::lds_u32(address + kOffset));
  }
  static FLASHTILE_DEVICE int read_before(uint32_t address) {
    return static_cast<int>(ptx::lds_u32(address + kOffset + 4));
  }
};
inline constexpr int kNotesBytes = 48;

// Byte offsets of the tiles in shared memory. A stage holds one block of Q, dO and its statistics;
// with two, the next block is copied into one while the other is read. Where only Q has two places,
// dO and the statistics lie behind both.
template <int kHeadDim, Memory kMemory, Variant kVariant = Variant::kPlain>
struct BackwardSmem {
  static constexpr BackwardConfig kConfig = backward_config(kHeadDim, kMemory, kVariant);
  using KeyTile = SmemTile<kConfig.block_k, kHeadDim>;    // K, V
  using QueryTile = SmemTile<kConfig.block_q, kHeadDim>;  // Q, dO
  using ScoreTile = SmemTile<kConfig.block_k, 64>;        // P^T, dS^T: [key, query], 16 bit
  static_assert(kConfig.block_q <= ScoreTile::kCols);

  static constexpr bool kTogether = kConfig.stages_q == kConfig.stages_dout;
  static_assert(kTogether || (kConfig.stages_q == 2 && kConfig.stages_dout == 1));
  static constexpr int kStatisticsBytes = 12 * kConfig.block_q;
  static constexpr int kStatisticsPlace = 1024;  // tiles start at multiples of it
  static constexpr int kScoreNotesBytes =
      kVariant == Variant::kModified ? TransposedNotes::kBytes : 0;
  static_assert(kStatisticsBytes + kNotesBytes + kScoreNotesBytes <= kStatisticsPlace);
  // From Q of the first stage.
  static constexpr int kDout = (kTogether ? 1 : 2) * QueryTile::kBytes;
  static constexpr int kStatistics = kDout + QueryTile::kBytes;
  static constexpr int kStageBytes =  // from Q to Q
      kTogether ? kStatistics + kStatisticsPlace : QueryTile::kBytes;
  static constexpr int kAllStages =
      kTogether ? kConfig.stages_q * kStageBytes : kStatistics + kStatisticsPlace;

  static constexpr int kK = 0;
  static constexpr int kStages = KeyTile::kBytes;
  static constexpr int kScores = kStages + kAllStages;  // dS^T
  static constexpr bool kHasExchange = kConfig.split_head_dim && !kConfig.one_exchange;
  static constexpr int kExchange = kScores + (kHasExchange ? ScoreTile::kBytes : 0);  // P^T
  static constexpr int kOwnV = kExchange + ScoreTile::kBytes;
  // V that is kept in registers passes through the stages before their first use.
  static constexpr int kV = kConfig.v_in_registers ? kStages : kOwnV;
  static constexpr int kBytes = kOwnV + (kConfig.v_in_registers ? 0 : KeyTile::kBytes);
  // The notes below, in what the first stage's statistics leave free.
  static constexpr int kNotes = kStages + kStatistics + kStatisticsBytes;
  static constexpr int kScoreNotes = kNotesBytes;  // from kNotes
  static_assert(!kConfig.v_in_registers || KeyTile::kBytes <= kAllStages);
  static_assert(kBytes + 1024 <= shared_memory_limit(kMemory));  // 1 KB is the driver's
};

// Copies rows of one tensor into tiles. A thread moves one 16-byte column of every panel (of all
// panels where they are a power of two: one column), in every kRowsPerPass-th row.
template <class Tile, int kThreads>
struct RowCopy {
  static constexpr int kRowChunks = Tile::kCols / 8;
  // Of a row. A panel of 64 columns has eight chunks, one of 32 has four.
  static constexpr int kLanes = Tile::kPanels % 3 == 0 ? Tile::kPanelChunks : kRowChunks;
  static constexpr int kChunks = kRowChunks / kLanes;  // of a row, per thread, a panel apart
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0 && kPasses * kRowsPerPass == Tile::kRows);

  static FLASHTILE_DEVICE int row(int thread) { return thread / kLanes; }
  static FLASHTILE_DEVICE int chunk(int thread) { return thread % kLanes; }
  static FLASHTILE_DEVICE uint32_t offset(int thread) {
    return Tile::offset(row(thread), chunk(thread));
  }
  // The thread's first element; row0: the tile's first row within the tensor.
  static FLASHTILE_DEVICE char* source(const View& view, const Sequence& sequence, int64_t row0,
                                       int head, int thread) {
    return row_address(view, sequence, row0 + row(thread), head) + chunk(thread) * kChunkBytes;
  }
  // All rows of the tile exist. Leaves `source` at the thread's first row of the next tile.
  static FLASHTILE_DEVICE void copy(uint32_t shared, const char*& source, int64_t pass_bytes) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      FLASHTILE_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        ptx::cp_async_16(shared + i * kRowsPerPass * Tile::kPanelRowBytes + c * Tile::kPanelBytes,
                         source + c * Tile::kPanelRowBytes);
      }
      source += pass_bytes;
      ptx::opaque(source);
    }
  }
  // The same for rows of any format, of which those from `rows` on become 0.
  static FLASHTILE_DEVICE void copy_any(uint32_t shared, const char*& source, int64_t pass_bytes,
                                        int rows, const RowFormat& format) {
    const int thread = ptx::thread_index();
    const int bytes = format.bytes - chunk(thread) * kChunkBytes;
    const int rows_left = rows - row(thread);
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        copy_chunk(shared + i * kRowsPerPass * Tile::kPanelRowBytes + c * Tile::kPanelBytes,
                   source + c * Tile::kPanelRowBytes,
                   i * kRowsPerPass < rows_left ? bytes - c * Tile::kPanelRowBytes : 0,
                   format.unit);
      }
      source += pass_bytes;
    }
  }
};

// A 16-bit tile of scores as A operands of the next products: [row block][k16 step].
template <int kRows, int kCols>
struct PackedScores {
  uint32_t x[kCols / 16][kRows / 16][4];  // pairs of 16-bit elements

  // Some columns: k16 steps from `first` on.
  template <class T, int kSome>
  FLASHTILE_DEVICE void pack(const Accumulator<kRows, kSome>& s, int first = 0) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kSome / 16; ++k) {
      FLASHTILE_UNROLL
      for (int m = 0; m < kRows / 16; ++m) to_operand<T>(x[first + k][m], s, m, k);
    }
  }
  // To a tile [row, col]; `address`: this lane's pair of row block 0, column block 0.
  template <class Tile>
  FLASHTILE_DEVICE void store(uint32_t address) const {
    FLASHTILE_UNROLL
    for (int k = 0; k < kCols / 16; ++k) {
      FLASHTILE_UNROLL
      for (int m = 0; m < kRows / 16; ++m) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * m + 8 * (i % 2), n = 2 * k + i / 2;
          ptx::sts_u32((address ^ (n * kChunkBytes)) + row * Tile::kPanelRowBytes, x[k][m][i]);
        }
      }
    }
  }
};

}  // namespace flashtile
