// Turns in which key blocks add to dQ on sm_90a, so that every dQ is a sum in one order. As
// backward/turns.cuh has it, but each warpgroup takes turns of its own, for its own part of dQ, and
// has a word of its own that says how far it has come; where the predecessor begins is in the
// notes.
#pragma once

#include "backward/sm90_shape.cuh"
#include "backward/turns.cuh"

namespace flashtile {

struct NoGroupTurns {
  static constexpr bool kOrdered = false;
  static FLASHTILE_DEVICE int take_work(const BackwardLaunch&, char*) { return ptx::block_index(); }
  template <int kGroup>
  static FLASHTILE_DEVICE void wait(const BackwardLaunch&, uint32_t, int) {}
  template <int kGroup>
  static FLASHTILE_DEVICE void pass(const BackwardLaunch&, uint32_t, int) {}
  template <int kGroup>
  static FLASHTILE_DEVICE void finish(const BackwardLaunch&, int) {}
};

template <class Shape>
struct GroupTurns {
  static constexpr bool kOrdered = true;
  // By all threads of the block, through a word of shared memory that is not in use yet.
  static FLASHTILE_DEVICE int take_work(const BackwardLaunch& launch, char* shared) {
    return DqTurns::take_work(launch, shared);
  }
  // One thread: until the key block before has come past `slot`, or at once where it does not see
  // the slot.
  template <int kGroup>
  static FLASHTILE_DEVICE void await(const BackwardLaunch& launch, uint32_t notes, int slot) {
    const HeadNotes my = read_notes<HeadNotes>(notes);
    const int block = (slot - read_notes<BandNotes>(notes).first_slot) %
                      static_cast<int>(launch.slots_q);  // within the sequence
    const bool is_free = my.before < 0 || block < my.before_from;
    const int before = is_free ? TurnWords::kNobody : word(my.before, kGroup);
    while (ptx::atomic_add_acquire(launch.turns + before, 0) <= slot) {
    }
  }
  // One thread: all is added to `slot` and to what lies before it.
  template <int kGroup>
  static FLASHTILE_DEVICE void tell(const BackwardLaunch& launch, uint32_t notes, int slot) {
    const int own = word(read_notes<HeadNotes>(notes).index, kGroup);
    ptx::red_max_release(launch.turns + own, slot + 1);
  }
  // The same by all threads of the warpgroup.
  template <int kGroup>
  static FLASHTILE_DEVICE void wait(const BackwardLaunch& launch, uint32_t notes, int slot) {
    if (is_first_thread()) await<kGroup>(launch, notes, slot);
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // it is our turn
  }
  template <int kGroup>
  static FLASHTILE_DEVICE void pass(const BackwardLaunch& launch, uint32_t notes, int slot) {
    ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads);  // dQ has been added to
    if (is_first_thread()) tell<kGroup>(launch, notes, slot);
  }
  // By one thread, when the warpgroup has passed its last block and has added all.
  template <int kGroup>
  static FLASHTILE_DEVICE void finish(const BackwardLaunch& launch, int index) {
    ptx::red_max_release(launch.turns + word(index, kGroup), TurnWords::kPastAll);
  }

 private:
  static FLASHTILE_DEVICE int word(int index, int group) {
    return TurnWords::kBlocks + Shape::kWarpgroups * index + group;
  }
  static FLASHTILE_DEVICE bool is_first_thread() {
    return ptx::thread_index() % Shape::kGroupThreads == 0;
  }
};

}  // namespace flashtile
