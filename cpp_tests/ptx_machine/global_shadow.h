// The shadow of global memory: every access against the last write and the last reads of its words.
#pragma once

#include "access.h"

namespace ptx {

// One access of one lane: `bytes` at `address`, inside of the allocation.
struct GlobalAccess {
  Warp& warp;
  uint32_t pc;
  int lane;
  uint64_t address;
  uint32_t bytes;
  Access access;
  uint8_t how = 0;    // flags of How
  uint32_t load = 0;  // of a bulk load: its AsyncWrite
};

// A contiguous range that a bulk copy of this lane reads or writes: bounds, shadow, counters. A
// write stays in flight until end_bulk_write.
void check_bulk_global(const GlobalAccess& at);

// Reports and aborts where the access is not ordered after those that it conflicts with.
void check_global(const GlobalAccess& at, Allocation& range);

// The thread has waited for its bulk copy into these bytes: what it knows includes the copy.
void end_bulk_write(Block& block, int thread, uint64_t address, uint32_t bytes);

}  // namespace ptx
