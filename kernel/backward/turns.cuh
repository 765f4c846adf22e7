// Turns in which key blocks add to dQ, so that every dQ is a sum in one order: deterministic.
//
// The last key block of a sequence comes first: under a causal mask it is the shortest, and each
// one begins with a block of queries that none before it sees, so all walk side by side and none
// waits. Every key block says how far it has come: below which slot of the workspace it has added
// all its dQ. The next one adds to a slot only when its predecessor has come past it. The blocks
// of queries that a key block visits begin and end no later than its predecessor's; slots before
// the predecessor's first are seen by none before, so what holds of the predecessor holds of all.
//
// A thread block that waits must not keep the one it waits for from running: thread blocks
// therefore take their work in the order in which they start (a ticket), and only wait for the
// ticket before theirs. Every thread block says in the end that it has come past everything, also
// one without work: so none waits for ever, whatever cu_seqlens hold.
#pragma once

#include "backward/tile.cuh"
#include "ptx/order.cuh"

namespace flashtile {

// The order of turns: of the heads' key blocks as they are numbered, heads in ascending order, the
// blocks of a head in descending order.
struct TurnOrder {
  static FLASHTILE_DEVICE int block_of(const BackwardLaunch& launch, int ticket) {
    const int slots = static_cast<int>(launch.slots_k);
    return ticket / slots * slots + slots - 1 - ticket % slots;
  }
  // The block whose turn is before that of `block`, which is number `index`; -1: none. It has a
  // smaller ticket, whatever cu_seqlens hold.
  static FLASHTILE_DEVICE int before(const BackwardLaunch& launch, const RowBlock& block, int index,
                                     int block_k) {
    const bool is_first = block.owned <= block_k || block.slot + 1 >= launch.slots_k;
    return is_first ? -1 : index + 1;
  }
};

struct NoTurns {
  static FLASHTILE_DEVICE int take_work(const BackwardLaunch&, char*) { return ptx::block_index(); }
  static FLASHTILE_DEVICE void start(int, int, uint32_t) {}
  static FLASHTILE_DEVICE void wait(const BackwardLaunch&, int, uint32_t) {}
  static FLASHTILE_DEVICE void come_to(const BackwardLaunch&, int, uint32_t) {}
  static FLASHTILE_DEVICE void finish(const BackwardLaunch&, int) {}
};

// Of one key block. All threads call; wait stands before a barrier of the whole block, come_to
// after one, which makes one thread's turn everybody's. Only thread 0 does anything, and it keeps
// nothing in registers: what it needs are the notes.
struct DqTurns {
  // The key block of the thread block's ticket, through a word of shared memory that is not in use
  // yet.
  static FLASHTILE_DEVICE int take_work(const BackwardLaunch& launch, char* shared) {
    int& ticket = *reinterpret_cast<int*>(shared);
    if (ptx::thread_index() == 0) ticket = ptx::atomic_add(launch.turns + TurnWords::kTickets, 1);
    __syncthreads();  // the ticket is there
    const int taken = ticket;
    __syncthreads();  // everybody has read it
    return TurnOrder::block_of(launch, taken);
  }
  // `before`: TurnOrder's.
  static FLASHTILE_DEVICE void start(int index, int before, uint32_t notes) {
    if (ptx::thread_index() != 0) return;
    write_notes(notes,
                TurnNotes{.own = TurnWords::kBlocks + index,
                          .before = before < 0 ? TurnWords::kNobody : TurnWords::kBlocks + before});
  }
  // Until the key block before has come past `slot`.
  static FLASHTILE_DEVICE void wait(const BackwardLaunch& launch, int slot, uint32_t notes) {
    if (ptx::thread_index() != 0) return;
    int* const before = launch.turns + TurnNotes::read_before(notes);
    while (ptx::atomic_add_acquire(before, 0) <= slot) {
    }
  }
  // This block has added all that it adds before `slot`.
  static FLASHTILE_DEVICE void come_to(const BackwardLaunch& launch, int slot, uint32_t notes) {
    if (ptx::thread_index() != 0) return;
    ptx::red_max_release(launch.turns + TurnNotes::read_own(notes), slot);
  }
  static FLASHTILE_DEVICE void finish(const BackwardLaunch& launch, int index) {
    if (ptx::thread_index() != 0) return;
    ptx::red_max_release(launch.turns + TurnWords::kBlocks + index, TurnWords::kPastAll);
  }
};

}  // namespace flashtile
