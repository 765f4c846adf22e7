// What the three backward kernels hand to each other: the workspace and the order of its elements.
//
// Queries are cut into slots of block_q rows (tile/work.cuh). Per head and slot the workspace holds
//
//   statistics [block_q / 16][3][4][4], fp32, padded to 4 floats a query: for 16 queries, lane l
//   reads at l % 4 one float4 of
//     lse * log2(e) (queries 2t, 2t+1, 2t+8, 2t+9, t = l % 4) and two of -delta (2t, 2t+1, 2t,
//     2t+1, then the same 8 queries on): what an n8 accumulator tile of dP^T starts from;
//   behind them a flag, see BackwardSlot::kHuge.
//   dq [block_q * head_dim], fp32: dQ / scale in accumulator order, [register][thread]: every
//   addition
//     of a warp goes to 128 neighbouring bytes.
#pragma once

#include <cstdint>

#include "config.cuh"
#include "params.h"
#include "tile/constants.cuh"
#include "tile/mask.cuh"
#include "tile/row_format.cuh"
#include "tile/smem_tile.cuh"
#include "tile/work.cuh"

namespace flashtile {

// The words of the workspace by which key blocks take turns at dQ (backward/turns.cuh): the ticket
// counter, a predecessor for those that have none, and how far each key block has come.
struct TurnWords {
  static constexpr int kTickets = 0;
  static constexpr int kNobody = 1;
  static constexpr int kBlocks = 2;  // of block 0; the others follow
  static constexpr int kPastAll = INT32_MAX;

  static FLASHTILE_HOST_DEVICE int64_t count(int64_t key_blocks) { return kBlocks + key_blocks; }
  static FLASHTILE_HOST_DEVICE int at_start(int64_t word) { return word == kNobody ? kPastAll : 0; }
};

// The arguments of the kernels before and after the main one, and most of its own.
struct BackwardLaunch {
  BackwardParams params;
  float* statistics = nullptr;      // [num_heads, slots_q, 4 block_q]
  float* dq_accumulator = nullptr;  // [num_heads, slots_q, block_q * head_dim]
  int* turns = nullptr;             // TurnWords; only when deterministic
  int64_t slots_q = 0;
  int64_t slots_k = 0;
  float scale_log2 = 0.0f;       // softmax_scale * log2(e)
  int64_t q_pass_bytes = 0;      // from a row that a thread copies to its next one, in q
  int64_t dout_pass_bytes = 0;   // and in dout
  bool rows_fill_tiles = false;  // rows of q, k, v, dout fill the tiles and are 16-byte aligned
  RowFormat q, k, v, out, dout, dq, dk, dv;
};

template <int kBlockQ, int kHeadDim>
struct BackwardSlot {
  static constexpr int kStatistics = 4 * kBlockQ;  // floats
  static constexpr int kDq = kBlockQ * kHeadDim;   // floats
  static constexpr int kHuge = 3 * kBlockQ;        // floats to the flag: some |lse| is huge

  // A slot's parts of the workspace: a multiplication instead of a pointer kept in registers.
  static FLASHTILE_DEVICE float* statistics(const BackwardLaunch& launch, int64_t slot) {
    return launch.statistics + slot * kStatistics;
  }
  static FLASHTILE_DEVICE float* dq(const BackwardLaunch& launch, int64_t slot) {
    return launch.dq_accumulator + slot * kDq;
  }

  // Floats from the start of the statistics to the lse of `query`, 0 <= query < kBlockQ.
  static FLASHTILE_HOST_DEVICE int lse(int query) {
    return query / 16 * 48 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2;
  }
  // The same for the first -delta of `query`; the second lies two floats further.
  static FLASHTILE_HOST_DEVICE int minus_delta(int query) {
    return query / 16 * 48 + 16 + query % 16 / 2 * 4 + query % 2;
  }
  // Whether some query of every kThreads'th block, from `first` on, has scores so large that
  // exp2(score - lse) may be anything (see BackwardDelta). `statistics`: of block 0.
  template <int kThreads>
  static FLASHTILE_DEVICE bool has_huge_scores(const float* statistics, int first, int blocks) {
    bool huge = false;
    for (int i = first; i < blocks; i += kThreads)
      huge |= statistics[int64_t{i} * kStatistics + kHuge] != 0.0f;
    return huge;
  }
};

// Where dQ's accumulators lie: [register][thread], for warps (row, column) of the dQ warp grid.
template <int kHeadDim, Memory kMemory, Variant kVariant = Variant::kPlain>
struct DqOrder {
  static constexpr BackwardConfig kConfig = backward_config(kHeadDim, kMemory, kVariant);
  static constexpr int kBlockQ = kConfig.block_q;
  static constexpr int kWarpCols = kConfig.warps() / kConfig.dq_warps_q;
  static constexpr int kRows = kConfig.block_q / kConfig.dq_warps_q;  // of one warp
  using Columns = ColumnSplit<kHeadDim, kWarpCols>;
  static constexpr int kCols = Columns::kCols;  // of one warp
  static constexpr int kThreads = 32 * kConfig.warps();

  // Floats from the start of the slot to (row, col), col a multiple of 8. Columns col + 2 i and
  // col + 2 i + 1 lie i and kThreads + i floats further, i < 4.
  static FLASHTILE_HOST_DEVICE int offset(int row, int col) {
    const int warp = row / kRows * kWarpCols + Columns::part(col);
    const int block = row % kRows / 16 * (kCols / 8) + Columns::col_in_part(col) / 8;
    const int first_register = block * 4 + row / 8 % 2 * 2;
    return first_register * kThreads + warp * 32 + row % 8 * 4;
  }
  // Columns col to col + 7 of a row.
  static FLASHTILE_DEVICE void load(const float* slot, int row, int col, float (&x)[8]) {
    const float* const source = slot + offset(row, col);
    const float4 even = *reinterpret_cast<const float4*>(source);
    const float4 odd = *reinterpret_cast<const float4*>(source + kThreads);
    const float evens[4] = {even.x, even.y, even.z, even.w};
    const float odds[4] = {odd.x, odd.y, odd.z, odd.w};
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = evens[i];
      x[2 * i + 1] = odds[i];
    }
  }
};

// Block `index` of a grid of heads x slots, slots fastest.
template <Side kSide, int kBlock, int kBlockQ>
FLASHTILE_DEVICE RowBlock row_block(const Problem& problem, int64_t slots, int index) {
  constexpr bool kQueries = kSide == Side::kQueries;
  const int head = index / static_cast<int>(slots);
  const int slot = index % static_cast<int>(slots);
  Sequence sequence;
  int row0;
  int64_t first_slot_q;
  if (problem.is_varlen()) {
    const int32_t* cu_seqlens = kQueries ? problem.cu_seqlens_q : problem.cu_seqlens_k;
    const int b = find_sequence(cu_seqlens, static_cast<int>(problem.batch), slot, kBlock);
    sequence = sequence_of(problem, b);
    const int64_t first = first_slot(kQueries ? sequence.row_q : sequence.row_k, b, kBlock);
    row0 = static_cast<int>(slot - first) * kBlock;
    first_slot_q = first_slot(sequence.row_q, b, kBlockQ);
  } else {
    const int seqlen = static_cast<int>(kQueries ? problem.seqlen_q : problem.seqlen_k);
    const int per_sequence = ceil_div(seqlen, kBlock);
    sequence = sequence_of(problem, slot / per_sequence);
    row0 = slot % per_sequence * kBlock;
    first_slot_q = sequence.batch * ceil_div(static_cast<int>(problem.seqlen_q), kBlockQ);
  }
  RowBlock block = block_from<kSide>(row0, head, sequence);
  block.slot = slot;
  block.first_slot_q = first_slot_q;
  return block;
}

}  // namespace flashtile
