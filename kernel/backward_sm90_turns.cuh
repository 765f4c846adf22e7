// Turns in which key blocks add to dQ on sm_90a, so that every dQ is a sum in one order. As
// backward_turns.cuh has it, but each warpgroup takes turns of its own, for its own part of dQ.
#pragma once

#include "backward_sm90_shape.cuh"
#include "backward_turns.cuh"

namespace flashtile {

struct NoGroupTurns {
  template <int kGroup>
  static FLASHTILE_DEVICE void wait(const BackwardLaunch&, uint32_t, int, int) {}
  template <int kGroup>
  static FLASHTILE_DEVICE void pass(const BackwardLaunch&, int) {}
};

// Counters [num_heads, slots_q, 2]: which key block of the sequence comes next.
template <class Shape>
struct GroupTurns {
  static FLASHTILE_DEVICE int* tickets(const BackwardLaunch& launch) {
    return counter(launch, launch.params.problem.num_heads * launch.slots_q, 0);
  }

  // Until all key blocks from the first that visits query block `block` have passed.
  template <int kGroup>
  static FLASHTILE_DEVICE void wait(const BackwardLaunch& launch, uint32_t notes, int slot,
                                    int block) {
    if (is_first_thread()) {
      const HeadNotes my = read_word<HeadNotes>(notes);
      const int first_key = max(block * Shape::kBlockQ + my.lowest_key, 0);
      const int turn = my.key_block - first_key / Shape::kBlockK;
      while (ptx::atomic_add_acquire(counter(launch, slot, kGroup), 0) < turn) {
      }
    }
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // it is our turn
  }
  template <int kGroup>
  static FLASHTILE_DEVICE void pass(const BackwardLaunch& launch, int slot) {
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // dQ has been added to
    if (is_first_thread()) ptx::red_add_release(counter(launch, slot, kGroup), 1);
  }

 private:
  static FLASHTILE_DEVICE int* counter(const BackwardLaunch& launch, int64_t slot, int group) {
    return launch.turns + Shape::kWarpgroups * slot + group;
  }
  static FLASHTILE_DEVICE bool is_first_thread() {
    return ptx::thread_index() % Shape::kGroupThreads == 0;
  }
};

}  // namespace flashtile
