// Copies of the backward's main loop: one block of keys, then blocks of queries, asynchronously.
#pragma once

#include "backward/sm80_shape.cuh"

namespace flashtile {

// The rows of a block of queries, for those who copy them.
template <class Shape>
struct RowsToCopy {
  bool fill_tile;  // all exist, fill the tile and are 16-byte aligned
  int count;       // that exist; none past the last block

  // Of a block that is known to be whole.
  static FLASHTILE_DEVICE RowsToCopy whole(const BackwardLaunch& launch) {
    return {launch.rows_fill_tiles, Shape::kBlockQ};
  }
  static FLASHTILE_DEVICE RowsToCopy any(const BackwardLaunch& launch, int block,
                                         uint32_t notes_address) {
    const QueryNotes notes = read_notes<QueryNotes>(notes_address);
    const int count = block < notes.end ? notes.seqlen_q - block * Shape::kBlockQ : 0;
    return {launch.rows_fill_tiles && count >= Shape::kBlockQ, count};
  }
};

// This thread's part in copying Q, dO and the statistics of one block of queries.
template <class Shape>
struct QueryLoader {
  using Smem = typename Shape::Smem;
  using QueryCopy = typename Shape::QueryCopy;

  const char *q, *dout;  // first source of the next block
  uint32_t fill;         // its place in the stage that the next block goes to
  uint32_t fill_dout;    // the same of dO, where it has one place only

  FLASHTILE_DEVICE QueryLoader(uint32_t stages, int thread)
      : fill(stages + QueryCopy::offset(thread)), fill_dout(fill + Smem::kDout) {}

  // Goes to row `row` of a head of the sequence.
  FLASHTILE_DEVICE void start(const BackwardLaunch& launch, const Sequence& s, int row, int head) {
    const int thread = ptx::thread_index();
    q = QueryCopy::source(launch.params.q, s, s.row_q + row, head, thread);
    dout = QueryCopy::source(launch.params.dout, s, s.row_q + row, head, thread);
  }

  // Parts of the next block in one burst: Q, and dO with the statistics. `slot`: the block's place
  // in the workspace.
  enum Parts { kQ = 1, kDout = 2, kAll = 3 };
  template <Parts kParts>
  FLASHTILE_DEVICE void load(const BackwardLaunch& launch, const RowsToCopy<Shape>& rows,
                             int slot) {
    if (rows.fill_tile) {
      if constexpr (kParts & kQ) QueryCopy::copy(fill, q, launch.q_pass_bytes);
      if constexpr (kParts & kDout) {
        QueryCopy::copy(dout_place(), dout, launch.dout_pass_bytes);
        copy_statistics(launch, slot);
      }
    } else if (rows.count > 0) {
      if constexpr (kParts & kQ)
        QueryCopy::copy_any(fill, q, launch.q_pass_bytes, rows.count, launch.q);
      if constexpr (kParts & kDout) {
        QueryCopy::copy_any(dout_place(), dout, launch.dout_pass_bytes, rows.count, launch.dout);
        copy_statistics(launch, slot);
      }
    }
    ptx::cp_async_commit();
  }

 private:
  FLASHTILE_DEVICE uint32_t dout_place() const {
    return Smem::kTogether ? fill + Smem::kDout : fill_dout;
  }
  // The first rows of a tile's first panel lie in as many bytes as the statistics: the threads
  // that copy these rows copy the statistics, too, and what leads to their chunk there leads to
  // their part. (Rows of four chunks leave half of the bytes out; there, threads go by number.)
  static constexpr bool kSameOffset = QueryCopy::kLanes >= 8;
  static FLASHTILE_DEVICE bool copies_statistics(unsigned thread) {
    constexpr unsigned kRows = Smem::kStatisticsBytes / Shape::QueryTile::kPanelRowBytes;
    if constexpr (!kSameOffset) return thread < Smem::kStatisticsBytes / kChunkBytes;
    return thread < kRows * QueryCopy::kLanes &&
           thread % QueryCopy::kLanes < Shape::QueryTile::kPanelChunks;
  }
  FLASHTILE_DEVICE void copy_statistics(const BackwardLaunch& launch, int slot) const {
    const int thread = ptx::thread_index();
    if (!copies_statistics(thread)) return;
    uint32_t to = dout_place() + (Smem::kStatistics - Smem::kDout);
    uint32_t offset = to % Smem::kStatisticsPlace;  // tiles and statistics start at multiples
    if constexpr (!kSameOffset) {
      offset = thread * kChunkBytes;
      to += offset - QueryCopy::offset(thread);
    }
    ptx::cp_async_16(to,
                     reinterpret_cast<const char*>(Shape::Slot::statistics(launch, slot)) + offset);
  }
};

// K and V of a block of keys.
template <class Shape>
FLASHTILE_DEVICE void load_keys(const BackwardLaunch& launch, const RowBlock& block, uint32_t smem,
                                int thread) {
  using Smem = typename Shape::Smem;
  using KeyCopy = typename Shape::KeyCopy;
  const BackwardParams& p = launch.params;
  const Sequence& s = block.sequence;
  const uint32_t offset = KeyCopy::offset(thread);
  const int64_t row0 = s.row_k + block.row0;
  const char* k = KeyCopy::source(p.k, s, row0, block.head, thread);
  const char* v = KeyCopy::source(p.v, s, row0, block.head, thread);
  const int64_t k_pass = 2 * KeyCopy::kRowsPerPass * p.k.stride_seq;
  const int64_t v_pass = 2 * KeyCopy::kRowsPerPass * p.v.stride_seq;
  if (launch.rows_fill_tiles && block.rows >= Shape::kBlockK) {
    KeyCopy::copy(smem + Smem::kK + offset, k, k_pass);
    KeyCopy::copy(smem + Smem::kV + offset, v, v_pass);
  } else {
    KeyCopy::copy_any(smem + Smem::kK + offset, k, k_pass, block.rows, launch.k);
    KeyCopy::copy_any(smem + Smem::kV + offset, v, v_pass, block.rows, launch.v);
  }
  ptx::cp_async_commit();
}

}  // namespace flashtile
