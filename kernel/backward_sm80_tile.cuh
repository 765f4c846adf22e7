// The pieces of the mma.sync backward's main loop: shared memory, copies, addresses, products.
#pragma once

#include "backward_layout.cuh"
#include "tile/product_sm80.cuh"

namespace flashtile {

// Byte offsets of the tiles in shared memory. A stage holds one block of Q, dO and its statistics;
// while one stage is read the next block is copied into the other.
template <int kHeadDim, Memory kMemory>
struct BackwardSmem {
  static constexpr BackwardConfig kConfig = backward_config(kHeadDim, kMemory);
  using KeyTile = SmemTile<kConfig.block_k, kHeadDim>;    // K, V
  using QueryTile = SmemTile<kConfig.block_q, kHeadDim>;  // Q, dO
  using ScoreTile = SmemTile<kConfig.block_k, 64>;        // P^T, dS^T: [key, query], 16 bit
  static_assert(kConfig.block_q <= ScoreTile::kCols);

  static constexpr int kStatisticsBytes = 16 * kConfig.block_q;
  static constexpr int kDout = QueryTile::kBytes;            // within a stage
  static constexpr int kStatistics = 2 * QueryTile::kBytes;  // within a stage
  static constexpr int kStageBytes = kStatistics + 1024;     // a multiple of 1024, as tiles need
  static_assert(kStatisticsBytes <= 1024);

  static constexpr int kK = 0;
  static constexpr int kStages = KeyTile::kBytes;
  static constexpr int kScores = kStages + 2 * kStageBytes;      // dS^T
  static constexpr int kExchange = kScores + ScoreTile::kBytes;  // P^T
  static constexpr int kOwnV = kExchange + (kConfig.split_head_dim ? ScoreTile::kBytes : 0);
  // V that is kept in registers passes through the stages before their first use.
  static constexpr int kV = kConfig.v_in_registers ? kStages : kOwnV;
  static constexpr int kBytes = kOwnV + (kConfig.v_in_registers ? 0 : KeyTile::kBytes);
  static_assert(!kConfig.v_in_registers || KeyTile::kBytes <= 2 * kStageBytes);
  static_assert(kBytes + 1024 <= shared_memory_limit(kMemory));  // 1 KB is the driver's
};

// A lane's addresses of the 16 x 16 blocks of a tile, in one register: column blocks of a panel
// differ by an XOR, panels and rows are immediates of the instruction.
template <class Tile>
struct Cursor {
  uint32_t base;

  FLASHTILE_DEVICE Cursor(uint32_t tile, Lanes lanes, int lane, int row0, int chunk0 = 0)
      : base(tile + Tile::offset(row0 + lane_row(lanes, lane), chunk0 + lane_chunk(lanes, lane))) {}

  FLASHTILE_DEVICE uint32_t at(int row, int column_block, int tile_offset = 0) const {
    return (base ^ (column_block % 4 * 2 * kChunkBytes)) + column_block / 4 * Tile::kPanelBytes +
           row * kPanelRowBytes + tile_offset;
  }
};

// Copies rows of one tensor into tiles: one thread, one 16-byte column, every kRowsPerPass-th row.
template <class Tile, int kThreads>
struct RowCopy {
  static constexpr int kLanes = Tile::kCols / 8;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0 && kPasses * kRowsPerPass == Tile::kRows);

  static FLASHTILE_DEVICE int row(int thread) { return thread / kLanes; }
  static FLASHTILE_DEVICE uint32_t offset(int thread) {
    return Tile::offset(thread / kLanes, thread % kLanes);
  }
  // The thread's first element; row0: the tile's first row within the tensor.
  static FLASHTILE_DEVICE const char* source(const View& view, int64_t batch, int64_t row0,
                                             int head, int thread) {
    return static_cast<const char*>(view.data) +
           2 * (element_offset(view, batch, row0 + row(thread), head) + thread % kLanes * 8);
  }
  // Rows from rows_left on (counted from the thread's first row) become 0. Leaves `source` at the
  // thread's first row of the next tile.
  static FLASHTILE_DEVICE void copy(uint32_t shared, const char*& source, int64_t pass_bytes,
                                    int rows_left) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      ptx::cp_async_16(shared + i * kRowsPerPass * kPanelRowBytes, source,
                       i * kRowsPerPass < rows_left);
      source += pass_bytes;
      ptx::hide(source);
    }
  }
};

// Sets c = a b^T + c0, a: kRows rows of A (operand), b: rows of a tile stored [n, k]. c0(n) is the
// start value of n8 tile n, the same for all row blocks.
template <class T, int kRows, int kCols, class Operand, class Tile, class Start>
FLASHTILE_DEVICE void product_ABt(Accumulator<kRows, kCols>& c, const Operand& a,
                                  const Cursor<Tile>& b, int b_offset, Start start) {
  FLASHTILE_UNROLL
  for (int k = 0; k < Tile::kCols / 16; ++k) {
    uint32_t a_k[kRows / 16][4];
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) a.get(a_k[m], m, k);
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t b_nk[4];
      ptx::ldmatrix_x4(b_nk, b.at(16 * n, k, b_offset));
      if (k == 0) {
        const float4 c0 = start(2 * n), c1 = start(2 * n + 1);
        const float first[4] = {c0.x, c0.y, c0.z, c0.w};
        const float second[4] = {c1.x, c1.y, c1.z, c1.w};
        FLASHTILE_UNROLL
        for (int m = 0; m < kRows / 16; ++m) {
          ptx::mma_m16n8k16<T>(c.d[m][2 * n], a_k[m], b_nk[0], b_nk[1], first);
          ptx::mma_m16n8k16<T>(c.d[m][2 * n + 1], a_k[m], b_nk[2], b_nk[3], second);
        }
      } else {
        FLASHTILE_UNROLL
        for (int m = 0; m < kRows / 16; ++m) mma_pair<T>(c, m, n, a_k[m], b_nk);
      }
    }
  }
}

// c += a b for k16 step `a` and rows row.. of b, a tile stored [k, n].
template <class T, int kRows, int kCols, class Tile>
FLASHTILE_DEVICE void product_AB_step(Accumulator<kRows, kCols>& c,
                                      const uint32_t (&a)[kRows / 16][4], const Cursor<Tile>& b,
                                      int row, int b_offset) {
  FLASHTILE_UNROLL
  for (int n = 0; n < kCols / 16; ++n) {
    uint32_t b_kn[4];
    ptx::ldmatrix_x4_trans(b_kn, b.at(row, n, b_offset));
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) mma_pair<T>(c, m, n, a[m], b_kn);
  }
}

// A's rows in shared memory, read where they are used.
template <class Tile>
struct SharedRows {
  const Cursor<Tile>& cursor;
  int offset;

  FLASHTILE_DEVICE SharedRows(const Cursor<Tile>& cursor, int offset)
      : cursor(cursor), offset(offset) {}
  FLASHTILE_DEVICE void get(uint32_t (&a)[4], int m, int k) const {
    ptx::ldmatrix_x4(a, cursor.at(16 * m, k, offset));
  }
};

// A's rows in registers.
template <class Tile, int kRows>
struct RegisterRows {
  uint32_t x[kRows / 16][Tile::kCols / 16][4];  // pairs of 16-bit elements

  FLASHTILE_DEVICE RegisterRows(const Cursor<Tile>& cursor, int offset) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      FLASHTILE_UNROLL
      for (int k = 0; k < Tile::kCols / 16; ++k)
        ptx::ldmatrix_x4(x[m][k], cursor.at(16 * m, k, offset));
    }
  }
  FLASHTILE_DEVICE void get(uint32_t (&a)[4], int m, int k) const {
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = x[m][k][i];
  }
};

// A 16-bit tile of scores as A operands of the next products: [row block][k16 step].
template <int kRows, int kCols>
struct PackedScores {
  uint32_t x[kCols / 16][kRows / 16][4];  // pairs of 16-bit elements

  template <class T>
  FLASHTILE_DEVICE void pack(const Accumulator<kRows, kCols>& s) {
    FLASHTILE_UNROLL
    for (int k = 0; k < kCols / 16; ++k) {
      FLASHTILE_UNROLL
      for (int m = 0; m < kRows / 16; ++m) to_operand<T>(x[k][m], s, m, k);
    }
  }
  // To a tile [row, col]; `address`: this lane's pair of row block 0, column block 0.
  FLASHTILE_DEVICE void store(uint32_t address) const {
    FLASHTILE_UNROLL
    for (int k = 0; k < kCols / 16; ++k) {
      FLASHTILE_UNROLL
      for (int m = 0; m < kRows / 16; ++m) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * m + 8 * (i % 2), n = 2 * k + i / 2;
          ptx::sts_u32((address ^ (n * kChunkBytes)) + row * kPanelRowBytes, x[k][m][i]);
        }
      }
    }
  }
};

}  // namespace flashtile
