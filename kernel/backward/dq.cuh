// Last launch of the backward: dQ from fp32 in accumulator order to rows of T, times the scale.
//
// One block per slot and head. Each thread writes up to 16 bytes of a row: eight values of four
// neighbouring lanes of the main kernel, which `Order` finds. Rows that see no key and rows that
// are not in use are 0, whatever K holds.
#pragma once

#include "backward/layout.cuh"
#include "tile/scores.cuh"

namespace flashtile {

// Policy: of the main kernel.
template <class T, int kHeadDim, class Order, class Policy = PlainScores>
struct BackwardDq {
  using Params = BackwardLaunch;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlockQ = Order::kBlockQ;
  static constexpr int kChunks = kHeadDim / 8;  // of a row
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;

  static FLASHTILE_DEVICE void run(const Params& launch, char*) {
    const BackwardParams& p = launch.params;
    const RowBlock block =
        row_block<Side::kQueries, kBlockQ, kBlockQ>(p.problem, launch.slots_q, ptx::block_index());
    if (block.empty()) return;
    const Sequence& s = block.sequence;
    const int64_t tile = block.head * launch.slots_q + block.slot;
    const float* statistics = Slot::statistics(launch, tile);
    const float* accumulator = Slot::dq(launch, tile);
    FLASHTILE_UNROLL
    for (int i = ptx::thread_index(); i < kBlockQ * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (row >= block.owned) break;
      const bool is_zero = row >= block.rows || statistics[Slot::lse(row)] == INFINITY;
      const uint4 x = is_zero ? make_uint4(0, 0, 0, 0)
                              : scaled(accumulator, row, 8 * chunk, p.problem.softmax_scale);
      char* const target = row_address(p.dq, s, s.row_q + block.row0 + row, block.head, 8 * chunk);
      store_chunk(target, x, launch.dq.bytes - chunk * kChunkBytes, launch.dq.unit);
    }
  }

 private:
  static FLASHTILE_DEVICE uint4 scaled(const float* slot, int row, int col, float scale) {
    float x[8];
    Order::load(slot, row, col, x);
    return make_uint4(
        ptx::pack<T>(x[0] * scale, x[1] * scale), ptx::pack<T>(x[2] * scale, x[3] * scale),
        ptx::pack<T>(x[4] * scale, x[5] * scale), ptx::pack<T>(x[6] * scale, x[7] * scale));
  }
};

}  // namespace flashtile
