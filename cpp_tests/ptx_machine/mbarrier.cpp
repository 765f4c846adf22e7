// What happens to an mbarrier: initialisation, arrivals, bytes, the end of a phase.
#include "mbarrier.h"

#include <algorithm>
#include <bit>

#include "access.h"
#include "warp.h"

namespace ptx {

namespace {

std::string named(const Mbarrier& b) {
  return "the mbarrier at offset " + std::to_string(b.offset);
}

}  // namespace

void Block::mbarrier_init(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t count) {
  const uint32_t offset = shared_offset(warp, pc, lane, address, 8);
  const int thread = warp.first_thread() + lane;
  if (count == 0 || count > kMaxArrivals)
    fail(Error::kBarrier, warp, pc, lane,
         "mbarrier.init with " + std::to_string(count) + " arrivals; allowed: 1 to 1048575");
  if (mbarriers.contains(offset))
    fail(Error::kBarrier, warp, pc, lane,
         named(mbarriers[offset]) + " is initialised while it is one; mbarrier.inval comes first");
  if (checks && !shadow->make_barrier(clocks, thread, offset, pc))
    fail_shadow(warp, pc, lane, Access::kWrite);
  Mbarrier b;
  b.offset = offset;
  b.expected = b.pending = count;
  b.init_thread = thread;
  b.init_stamp = clocks.own(thread);
  b.init_pc = pc;
  b.current = async.add_completion(thread, pc);
  mbarriers[offset] = std::move(b);
}

Mbarrier& Block::mbarrier(Warp& warp, uint32_t pc, int lane, uint64_t address) {
  const uint32_t offset = shared_offset(warp, pc, lane, address, 8);
  const auto it = mbarriers.find(offset);
  if (it == mbarriers.end())
    fail(Error::kBarrier, warp, pc, lane,
         "there is no initialised mbarrier at offset " + std::to_string(offset) +
             " of shared memory");
  Mbarrier& b = it->second;
  if (checks && !clocks.knows(warp.first_thread() + lane, b.init_thread, b.init_stamp))
    fail(Error::kBarrier, warp, pc, lane,
         "use of " + named(b) + " is not ordered after its initialisation by thread " +
             std::to_string(b.init_thread) + " at " + where(b.init_pc));
  return b;
}

void Block::mbarrier_for_copy(Warp& warp, uint32_t pc, int lane, const Mbarrier& b) {
  if (!checks || b.fenced) return;
  const int thread = warp.first_thread() + lane;
  if (clocks.shows(kSharedProxy, thread, b.init_thread, b.init_stamp)) return;
  fail(Error::kProxy, warp, pc, lane,
       "a bulk copy uses " + named(b) +
           ", and no fence.mbarrier_init or fence.proxy.async stands behind its initialisation by "
           "thread " +
           std::to_string(b.init_thread) + " at " + where(b.init_pc));
}

void Block::mbarrier_arrive(Warp& warp, uint32_t pc, uint32_t lanes, Mbarrier& b, uint32_t count) {
  while (lanes != 0) {
    const int lane = std::countr_zero(lanes);
    if (count == 0 || count > b.pending)
      fail(Error::kBarrier, warp, pc, lane,
           "arrival of " + std::to_string(count) + " at " + named(b) + ", whose phase " +
               std::to_string(b.phase) + " misses only " + std::to_string(b.pending) + " of " +
               std::to_string(b.expected) + " arrivals");
    // As many lanes as the phase takes.
    uint32_t now = 0;
    for (uint32_t room = b.pending / count; room != 0 && lanes != 0; --room) {
      now |= lanes & -lanes;
      lanes &= lanes - 1;
    }
    clocks.add_release(b.collecting, warp.first_thread(), now);
    b.pending -= count * static_cast<uint32_t>(std::popcount(now));
    ++progress;
    mbarrier_end_phase(b);
  }
}

void Block::mbarrier_bytes(Mbarrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (b.bytes > int64_t{kMaxArrivals} || b.bytes < -int64_t{kMaxArrivals})
    fail_thread(Error::kBarrier, b.init_thread, b.init_pc,
                named(b) + " counts " + std::to_string(b.bytes) + " bytes; at most 1048575 fit");
  ++progress;
}

void Block::mbarrier_end_phase(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  async.completion(b.current).complete = true;
  b.previous = b.current;
  b.current = async.add_completion(b.init_thread, b.init_pc);
  b.previous_copy = b.copy_pc;
  b.copy_pc = 0;
  ++b.phase;
  b.pending = b.expected;
  b.released = std::move(b.collecting);
  b.collecting = {};
  wake(Wait::kMbarrier, b.offset);
}

}  // namespace ptx
