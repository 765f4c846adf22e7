// Turns in which key blocks add to dQ on sm_90a, so that every dQ is a sum in one order. As
// backward_turns.cuh has it, but each warpgroup takes turns of its own, for its own part of dQ.
#pragma once

#include "backward_sm90_shape.cuh"
#include "backward_turns.cuh"

namespace flashtile {

struct NoGroupTurns {
  FLASHTILE_DEVICE NoGroupTurns(const BandMask&, const RowBlock&) {}
  FLASHTILE_DEVICE void start(const BackwardLaunch&, int64_t) {}
  template <int kGroup>
  FLASHTILE_DEVICE void wait(int) const {}
  template <int kGroup>
  FLASHTILE_DEVICE void pass() {}
};

// Counters [num_heads, slots_q, 2]: which key block of the sequence comes next.
template <class Shape>
struct GroupTurns {
  int lowest;     // BandMask's
  int key_block;  // index of the block of keys in the sequence
  int* next;      // the counters of the block of queries at hand

  FLASHTILE_DEVICE GroupTurns(const BandMask& mask, const RowBlock& block)
      : lowest(mask.lowest), key_block(block.row0 / Shape::kBlockK), next(nullptr) {}

  static FLASHTILE_HOST_DEVICE int64_t count(int64_t slots) {
    return Shape::kWarpgroups * slots + 1;
  }
  static FLASHTILE_DEVICE int* tickets(const BackwardLaunch& launch) {
    return launch.turns +
           Shape::kWarpgroups * launch.params.problem.num_heads * launch.slots_q;
  }

  FLASHTILE_DEVICE void start(const BackwardLaunch& launch, int64_t slot) {
    next = launch.turns + Shape::kWarpgroups * slot;
  }
  // Until all key blocks from the first that visits the block of queries have passed.
  template <int kGroup>
  FLASHTILE_DEVICE void wait(int query_block) const {
    if (ptx::thread_index() % Shape::kGroupThreads == 0) {
      const int first_key = max(query_block * Shape::kBlockQ + lowest, 0);
      const int turn = key_block - first_key / Shape::kBlockK;
      while (ptx::atomic_add_acquire(next + kGroup, 0) < turn) {
      }
    }
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // it is our turn
  }
  template <int kGroup>
  FLASHTILE_DEVICE void pass() {
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // dQ has been added to
    if (ptx::thread_index() % Shape::kGroupThreads == 0) ptx::red_add_release(next + kGroup, 1);
    next += Shape::kWarpgroups;
  }
};

}  // namespace flashtile
