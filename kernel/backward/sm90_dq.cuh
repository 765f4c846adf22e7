// How a warpgroup's part of a block's dQ gets to the fp32 dQ of the workspace, in the sm_90a
// backward: straight out of registers, or through shared memory, from where another warp adds it.
#pragma once

#include "backward/sm90_turns.cuh"
#include "ptx/reduce.cuh"

namespace flashtile {

// The warpgroup adds its own part, 16 bytes a thread and instruction. It is held up for as long as
// the memory system takes.
template <class Shape, class Turns>
struct DirectDq {
  // Called by the warpgroup's threads: `thread` is 0 to 255. `slot`: of the workspace.
  template <int kGroup, int kCols>
  static FLASHTILE_DEVICE void add(const BackwardLaunch& launch, uint32_t smem, int slot,
                                   const Accumulator<16, kCols>& dq, int thread) {
    Turns::template wait<kGroup>(launch, smem + Shape::kNotes, slot);
    float* const place = Shape::Slot::dq(launch, slot) + Shape::dq_floats(kGroup) +
                         thread % Shape::kGroupThreads * 4;
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 8; ++n)
      ptx::red_add(place + n * 4 * Shape::kGroupThreads, dq.d[0][n]);
    Turns::template pass<kGroup>(launch, smem + Shape::kNotes, slot);
  }
  // By one thread, behind the warpgroup's last block.
  template <int kGroup>
  static FLASHTILE_DEVICE void finish(const BackwardLaunch& launch, int index) {
    Turns::template finish<kGroup>(launch, index);
  }
};

// The warps that meet at the barriers of one warpgroup's place for dQ.
template <class Shape>
inline constexpr int kDqThreads = Shape::kGroupThreads + 32;

// The warpgroup leaves its part in shared memory, in the order of the slot, and goes on.
template <class Shape>
struct StagedDq {
  template <int kGroup, int kCols>
  static FLASHTILE_DEVICE void add(const BackwardLaunch&, uint32_t smem, int,
                                   const Accumulator<16, kCols>& dq, int thread) {
    const uint32_t place = smem + Shape::kDq + 4 * Shape::dq_floats(kGroup) +
                           thread % Shape::kGroupThreads * kChunkBytes;
    ptx::named_barrier_sync(kDqFree + kGroup, kDqThreads<Shape>);  // the last dQ has been read
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 8; ++n)
      ptx::sts_f32x4(place + n * Shape::kGroupThreads * kChunkBytes, dq.d[0][n]);
    ptx::fence_proxy_async_shared();  // to the copy that reads it
    ptx::named_barrier_arrive(kDqThere + kGroup, kDqThreads<Shape>);
  }
  // The reducer says when all has been added.
  template <int kGroup>
  static FLASHTILE_DEVICE void finish(const BackwardLaunch&, int) {}
};

// The warp that adds what a warpgroup has left, block by block, in the warpgroup's order.
template <class Shape, class Turns>
struct DqReducer {
  const BackwardLaunch& launch;
  uint32_t smem;

  template <int kGroup>
  FLASHTILE_DEVICE void run() const {
    const Problem& p = launch.params.problem;
    const uint32_t notes = smem + Shape::kNotes;
    const RangeNotes range = read_notes<RangeNotes>(notes);
    const bool leads = ptx::elect_one();
    int slot = read_notes<BandNotes>(notes).first_slot + range.begin;
    FLASHTILE_ROLL
    for (int heads = static_cast<int>(p.group()); heads > 0; --heads) {
      FLASHTILE_ROLL
      for (int i = 0; i < range.end - range.begin; ++i) {
        ptx::named_barrier_arrive(kDqFree + kGroup, kDqThreads<Shape>);
        ptx::named_barrier_sync(kDqThere + kGroup, kDqThreads<Shape>);  // the warpgroup has left dQ
        if (leads) add<kGroup>(slot + i);
        __syncwarp();
      }
      slot += static_cast<int>(launch.slots_q);
    }
    if (leads) Turns::template finish<kGroup>(launch, read_notes<HeadNotes>(notes).index);
  }

 private:
  // By one thread. Afterwards the place in shared memory is free.
  template <int kGroup>
  FLASHTILE_DEVICE void add(int slot) const {
    constexpr int kOffset = Shape::dq_floats(kGroup);
    constexpr uint32_t kBytes = 4 * 64 * Shape::dq_cols(kGroup);
    float* const place = Shape::Slot::dq(launch, slot) + kOffset;
    if constexpr (Turns::kOrdered) {
      Turns::template await<kGroup>(launch, smem + Shape::kNotes, slot);
      ptx::fence_proxy_async_global();  // what the key block before has added comes first
    }
    ptx::bulk_reduce_add_f32(place, smem + Shape::kDq + 4 * kOffset, kBytes);
    ptx::bulk_commit();
    if constexpr (Turns::kOrdered) {
      ptx::bulk_wait<0>();  // it has been added, not only read
      ptx::fence_proxy_async_global();
      Turns::template tell<kGroup>(launch, smem + Shape::kNotes, slot);
    } else {
      ptx::bulk_wait_read<0>();
    }
  }
};

}  // namespace flashtile
