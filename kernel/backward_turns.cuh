// Turns in which key blocks add to dQ, so that every dQ is a sum in one order: deterministic.
//
// A counter per head and block of queries says which key block of the sequence comes next. A thread
// block that waits must not keep the one it waits for from running: thread blocks therefore take
// their work in the order in which they start (a ticket), and only wait for lower tickets.
#pragma once

#include "backward_sm80_tile.cuh"
#include "ptx/order.cuh"

namespace flashtile {

struct NoTurns {
  static FLASHTILE_DEVICE void start(const TurnNotes&, uint32_t) {}
  static FLASHTILE_DEVICE void wait(const BackwardLaunch&, int, uint32_t) {}
  static FLASHTILE_DEVICE void pass_previous(const BackwardLaunch&, int, uint32_t) {}
  static FLASHTILE_DEVICE void pass(const BackwardLaunch&, int) {}
};

// The thread block's ticket, through a word of shared memory that nobody uses yet.
FLASHTILE_DEVICE int take_ticket(int* tickets, char* shared) {
  int& ticket = *reinterpret_cast<int*>(shared);
  if (ptx::thread_index() == 0) ticket = ptx::atomic_add(tickets, 1);
  __syncthreads();  // the ticket is there
  const int taken = ticket;
  __syncthreads();  // everybody has read it
  return taken;
}

// Of one key block. All threads call; wait stands before a barrier of the whole block, pass after
// one, which makes one thread's turn everybody's. Only thread 0 does anything, and it keeps nothing
// in registers: what it needs are the notes.
template <int kBlockQ, int kBlockK>
struct DqTurns {
  static FLASHTILE_DEVICE void start(const TurnNotes& head, uint32_t notes) {
    if (ptx::thread_index() == 0) write_notes(notes, head);
  }
  // Until it is this key block's turn to add to the query block at `slot`: all key blocks from the
  // first that visits it (BandMask::query_blocks) have passed. Relies on cu_seqlens that ascend:
  // others can leave an earlier key block without a thread block that passes on.
  static FLASHTILE_DEVICE void wait(const BackwardLaunch& launch, int slot, uint32_t address) {
    if (ptx::thread_index() != 0) return;
    const TurnNotes notes = read_notes<TurnNotes>(address);
    const int first_key = static_cast<int>(slot * unsigned{kBlockQ} + notes.to_first_key);
    const int first_block = static_cast<int>(static_cast<unsigned>(max(first_key, 0)) / kBlockK);
    const int turn = notes.key_block - first_block;
    while (ptx::atomic_add_acquire(launch.turns + slot, 0) < turn) {
    }
  }
  // The query block before the one at `slot`, if it was visited, has been added to.
  static FLASHTILE_DEVICE void pass_previous(const BackwardLaunch& launch, int slot,
                                             uint32_t address) {
    if (ptx::thread_index() != 0) return;
    if (slot > read_notes<TurnNotes>(address).first_visited)
      ptx::red_add_release(launch.turns + slot - 1, 1);
  }
  static FLASHTILE_DEVICE void pass(const BackwardLaunch& launch, int slot) {
    if (ptx::thread_index() == 0) ptx::red_add_release(launch.turns + slot, 1);
  }
};

}  // namespace flashtile
