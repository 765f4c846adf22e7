// Turns in which key blocks add to dQ, so that every dQ is a sum in one order: deterministic.
//
// A counter per head and block of queries says which key block of the sequence comes next. A thread
// block that waits must not keep the one it waits for from running: thread blocks therefore take
// their work in the order in which they start (a ticket), and only wait for lower tickets.
#pragma once

#include "backward_layout.cuh"
#include "ptx/order.cuh"

namespace flashtile {

struct NoTurns {
  FLASHTILE_DEVICE explicit NoTurns(int) {}
  FLASHTILE_DEVICE void start(const BackwardLaunch&, int64_t) {}
  FLASHTILE_DEVICE void wait(const BandMask&, int) {}
  FLASHTILE_DEVICE void added() {}
  FLASHTILE_DEVICE void pass() {}
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
// one, which makes one thread's turn everybody's.
template <int kBlockQ, int kBlockK>
struct DqTurns {
  int key_block;        // its index in the sequence
  int* next = nullptr;  // counter of the block of queries that comes next

  FLASHTILE_DEVICE explicit DqTurns(int key_block) : key_block(key_block) {}

  FLASHTILE_DEVICE void start(const BackwardLaunch& launch, int64_t slot) {
    next = launch.turns + slot;
  }
  // Until it is this key block's turn to add to query block `query_block`: all key blocks from the
  // first that visits it (BandMask::query_blocks) have passed. Relies on cu_seqlens that ascend:
  // others can leave an earlier key block without a thread block that passes on.
  FLASHTILE_DEVICE void wait(const BandMask& mask, int query_block) {
    if (ptx::thread_index() != 0) return;
    const int turn = key_block - mask.key_begin(query_block * kBlockQ) / kBlockK;
    while (ptx::atomic_add_acquire(next, 0) < turn) {
    }
  }
  FLASHTILE_DEVICE void added() { ++next; }
  // The block of queries that was added to last is the next key block's.
  FLASHTILE_DEVICE void pass() {
    if (ptx::thread_index() == 0) ptx::red_add_release(next - 1, 1);
  }
};

}  // namespace flashtile
