// Last launch of the backward: dQ from fp32 in accumulator order to rows of T, times the scale.
//
// One block per slot and head. Each thread writes 16 bytes of a row; its eight values are two runs
// of four floats (even and odd columns of four neighbouring lanes of the main kernel).
#pragma once

#include "backward_layout.cuh"

namespace flashtile {

template <class T, int kHeadDim, Memory kMemory>
struct BackwardDq {
  using Params = BackwardLaunch;
  using Order = DqOrder<kHeadDim, kMemory>;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlockQ = Order::kConfig.block_q;
  static constexpr int kLanes = kHeadDim / 8;  // threads that write one row
  static constexpr int kRowsPerPass = kThreads / kLanes;

  static FLASHTILE_DEVICE void run(const Params& launch, char*) {
    const BackwardParams& p = launch.params;
    const int thread = ptx::thread_index();
    const RowBlock block =
        row_block<Rows::kQueries, kBlockQ, kBlockQ>(p.problem, launch.slots_q, ptx::block_index());
    if (block.empty()) return;
    const Sequence& s = block.sequence;
    const float* accumulator =
        launch.dq_accumulator + (block.head * launch.slots_q + block.slot) * (kBlockQ * kHeadDim);
    const int col = thread % kLanes * 8;
    const float scale = p.problem.softmax_scale;
    FLASHTILE_UNROLL
    for (int row = thread / kLanes; row < kBlockQ; row += kRowsPerPass) {
      if (row >= block.rows) break;
      const float* source = accumulator + Order::offset(row, col);
      const float4 even = *reinterpret_cast<const float4*>(source);
      const float4 odd = *reinterpret_cast<const float4*>(source + Order::kThreads);
      uint4 x;
      x.x = ptx::pack<T>(even.x * scale, odd.x * scale);
      x.y = ptx::pack<T>(even.y * scale, odd.y * scale);
      x.z = ptx::pack<T>(even.z * scale, odd.z * scale);
      x.w = ptx::pack<T>(even.w * scale, odd.w * scale);
      T* dq = static_cast<T*>(p.dq.data) +
              element_offset(p.dq, s.batch, s.row_q + block.row0 + row, block.head) + col;
      *reinterpret_cast<uint4*>(dq) = x;
    }
  }
};

}  // namespace flashtile
