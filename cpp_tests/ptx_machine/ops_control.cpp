// Branches, exit, barriers, fences.
#include <algorithm>

#include "ops.h"

namespace ptx {

namespace {

// Lanes of the running split outside of `taken` go on at the next instruction.
void diverge(Warp& warp, uint32_t taken, uint32_t target) {
  if (taken == warp.mask) {
    warp.next = target;
    return;
  }
  warp.others.push_back({target, taken, Wait::kNone, 0});
  warp.mask &= ~taken;
  warp.event = true;
}

void branch(Warp& warp, const Inst& inst, uint32_t mask) {
  diverge(warp, mask, static_cast<uint32_t>(inst.operand[0]));
}

// operand: index register, count, targets.
void indexed_branch(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t* index = warp.at<const uint32_t>(inst.operand[0]);
  const uint32_t count = static_cast<uint32_t>(inst.operand[1]);
  while (mask != 0) {
    const int first = __builtin_ctz(mask);
    if (index[first] >= count) {
      warp.block->fail(Error::kOutOfBounds, warp, warp.pc, first,
                       "brx.idx index outside of its list");
    }
    uint32_t same = 0;
    for (int l = 0; l < kLanes; ++l) same |= (index[l] == index[first] ? 1u : 0u) << l;
    same &= mask;
    diverge(warp, same, static_cast<uint32_t>(inst.operand[2 + index[first]]));
    mask &= ~same;
  }
}

void exit_lanes(Warp& warp, const Inst&, uint32_t mask) {
  warp.live &= ~mask;
  warp.mask &= ~mask;
  warp.event = true;
  warp.exited = true;
}

void trap(Warp& warp, const Inst&, uint32_t mask) {
  warp.block->fail(Error::kTrap, warp, warp.pc, __builtin_ctz(mask),
                   "trap or failed device assert");
}

void nothing(Warp&, const Inst&, uint32_t) {}
void sleep(Warp& warp, const Inst&, uint32_t) { warp.yields = warp.event = true; }

uint32_t uniform(Warp& warp, int32_t place, uint32_t mask, const char* what) {
  const uint32_t* value = warp.at<const uint32_t>(place);
  const int first = __builtin_ctz(mask);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    if (value[l] != value[first]) {
      warp.block->fail(Error::kDivergence, warp, warp.pc, l,
                       std::string("the lanes of a warp give different ") + what);
    }
  }
  return value[first];
}

// kAligned: every lane of the warp that has not exited must execute it together.
template <bool kAligned, bool kCount, bool kWait>
void barrier(Warp& warp, const Inst& inst, uint32_t mask) {
  if (kAligned && warp.needs_lanes(mask, warp.live)) return;
  const uint32_t id = uniform(warp, inst.operand[0], mask, "barrier numbers");
  uint32_t expected = 0;
  if constexpr (kCount)
    expected = uniform(warp, inst.operand[1], mask, "thread counts for a barrier");
  const int lane = __builtin_ctz(mask);
  if (id >= kBarriers)
    warp.block->fail(Error::kDivergence, warp, warp.pc, lane, "barrier number above 15");
  if (kCount && (expected == 0 || expected % kLanes != 0)) {
    warp.block->fail(
        Error::kDivergence, warp, warp.pc, lane,
        "bar with " + std::to_string(expected) + " threads, which is not a multiple of 32");
  }
  ++warp.block->counters->barriers;
  if (kWait) warp.block_on(Wait::kBarrier, id, warp.pc + 1, mask);
  const uint32_t count = kAligned ? kLanes : static_cast<uint32_t>(std::popcount(mask));
  warp.block->arrive(warp, id, mask, expected, count, kWait);
}

// bar.red of a predicate over the whole block. Operands: result, barrier, source and its negation.
template <bool kOr>
void reducing_barrier(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, warp.live)) return;
  const int32_t* o = inst.operand;
  const uint32_t id = uniform(warp, o[1], mask, "barrier numbers");
  if (id >= kBarriers)
    warp.block->fail(Error::kDivergence, warp, warp.pc, __builtin_ctz(mask),
                     "barrier number above 15");
  const uint32_t set = (warp.pred(o[2]) ^ static_cast<uint32_t>(o[3])) & mask;
  ++warp.block->counters->barriers;
  warp.block_on(Wait::kBarrier, id, warp.pc + 1, mask);
  warp.block->vote(id, {&warp, o[0], mask, kOr}, set);
  warp.block->arrive(warp, id, mask, 0, kLanes, true);
}

void warp_barrier(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t members =
      uniform(warp, inst.operand[0], mask, "masks for bar.warp.sync") & warp.live;
  uint32_t here = mask;
  for (const Split& s : warp.others) {
    if (s.wait == Wait::kWarpSync && s.detail == members) here |= s.mask;
  }
  if ((here & members) != members) {
    warp.block_on(Wait::kWarpSync, members, warp.pc + 1, mask);
    return;
  }
  for (Split& s : warp.others) {
    if (s.wait == Wait::kWarpSync && s.detail == members) s.wait = Wait::kNone, warp.event = true;
  }
  std::vector<int> threads;
  for (int l = 0; l < kLanes; ++l) {
    if ((members >> l) & 1) threads.push_back(warp.index * kLanes + l);
  }
  warp.block->clocks.join(threads, threads);
}

}  // namespace

void add_control_ops(OpTable& t) {
  for (const char* name : {"bra", "bra.uni"}) t.add(name, "L", branch);
  t.add("brx.idx", "r", indexed_branch);
  for (const char* name : {"ret", "exit", "ret.uni"}) t.add(name, "", exit_lanes);
  t.add("trap", "", trap);
  t.add("nop", "", nothing);
  t.add("nanosleep.u32", "r", sleep);
  t.add("bar.sync", "r", barrier<true, false, true>);
  t.add("bar.sync", "rr", barrier<true, true, true>);
  t.add("bar.arrive", "rr", barrier<true, true, false>);
  t.add("barrier.sync", "r", barrier<false, false, true>);
  t.add("barrier.sync", "rr", barrier<false, true, true>);
  t.add("barrier.arrive", "rr", barrier<false, true, false>);
  t.add("barrier.sync.aligned", "r", barrier<true, false, true>);
  t.add("barrier.sync.aligned", "rr", barrier<true, true, true>);
  t.add("barrier.arrive.aligned", "rr", barrier<true, true, false>);
  t.add("barrier.cta.sync", "r", barrier<false, false, true>);
  t.add("barrier.cta.sync.aligned", "r", barrier<true, false, true>);
  for (const char* name : {"bar.red", "barrier.cta.red.aligned"}) {
    t.add(std::string(name) + ".or.pred", "p=rq", reducing_barrier<true>);
    t.add(std::string(name) + ".and.pred", "p=rq", reducing_barrier<false>);
  }
  t.add("bar.warp.sync", "r", warp_barrier);
  for (const char* space : {"prefetch.global.L1", "prefetch.global.L2"}) t.add(space, "M", nothing);
  for (const char* name : {"griddepcontrol.wait", "griddepcontrol.launch_dependents"})
    t.add(name, "", nothing);
}

}  // namespace ptx
