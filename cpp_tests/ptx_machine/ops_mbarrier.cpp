// mbarrier instructions and their fence.
#include "access.h"
#include "ops.h"

namespace ptx {

namespace {

// Calls use(lanes, first) for groups of lanes that name the same address.
template <class Use>
void for_groups(const uint64_t (&address)[kLanes], uint32_t mask, Use&& use) {
  while (mask != 0) {
    const int first = __builtin_ctz(mask);
    uint32_t same = 0;
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int l = __builtin_ctz(lanes);
      if (address[l] == address[first]) same |= 1u << l;
    }
    mask &= ~same;
    use(same, first);
  }
}

void read_shared_addresses(Warp& warp, const int32_t* operand, uint64_t (&address)[kLanes]) {
  read_addresses(warp, operand, address);
  for (uint64_t& a : address) a &= ~kWindowMask;
}

// operands: address, count
void init(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) uint64_t address[kLanes];
  read_shared_addresses(warp, inst.operand, address);
  const uint32_t* count = warp.at<const uint32_t>(inst.operand[3]);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    warp.block->mbarrier_init(warp, pc_of(warp, inst), l, address[l], count[l]);
  }
}

void invalidate(Warp& warp, const Inst& inst, uint32_t mask) {
  Block& block = *warp.block;
  alignas(64) uint64_t address[kLanes];
  read_shared_addresses(warp, inst.operand, address);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const Mbarrier& b = block.mbarrier(warp, pc_of(warp, inst), l, address[l]);
    const uint32_t offset = b.offset;
    if (b.bytes != 0)
      block.fail(Error::kBarrier, warp, pc_of(warp, inst), l,
                 "mbarrier.inval while " + std::to_string(b.bytes) + " bytes are outstanding");
    block.mbarriers.erase(offset);
    if (block.checks) block.shadow->drop_barrier(offset);
  }
}

enum class Arrive { kPlain, kExpect, kNoComplete };

// operands: state, address, [bytes if kExpect], [count if kCount]
template <Arrive kKind, bool kCount>
void arrive(Warp& warp, const Inst& inst, uint32_t mask) {
  Block& block = *warp.block;
  const uint32_t pc = pc_of(warp, inst);
  alignas(64) uint64_t address[kLanes];
  read_shared_addresses(warp, inst.operand + 1, address);
  const uint32_t* last = warp.at<const uint32_t>(
      kKind == Arrive::kExpect || kCount ? inst.operand[4] : inst.operand[0]);
  uint64_t* state = warp.at<uint64_t>(inst.operand[0]);
  for_groups(address, mask, [&](uint32_t lanes, int first) {
    Mbarrier& b = block.mbarrier(warp, pc, first, address[first]);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      state[l] = b.phase;
      if (kKind == Arrive::kExpect) block.mbarrier_bytes(b, last[l]);
      if (kKind == Arrive::kNoComplete && b.pending <= last[l])
        block.fail(Error::kBarrier, warp, pc, l,
                   "mbarrier.arrive.noComplete with the last arrivals of a phase");
      if (kKind == Arrive::kExpect || kCount)
        block.mbarrier_arrive(warp, pc, 1u << l, b, kCount ? last[l] : 1);
    }
    if (kKind == Arrive::kPlain && !kCount) block.mbarrier_arrive(warp, pc, lanes, b, 1);
  });
}

// operands: address, bytes
template <int kSign>
void bytes(Warp& warp, const Inst& inst, uint32_t mask) {
  Block& block = *warp.block;
  alignas(64) uint64_t address[kLanes];
  read_shared_addresses(warp, inst.operand, address);
  const uint32_t* value = warp.at<const uint32_t>(inst.operand[3]);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    Mbarrier& b = block.mbarrier(warp, pc_of(warp, inst), l, address[l]);
    block.mbarrier_bytes(b, kSign * int64_t{value[l]});
    if (kSign < 0) block.mbarrier_end_phase(b);
  }
}

// These lanes saw the end of the phase: they are ordered after its arrivals and copies.
void pass(Warp& warp, Mbarrier& b, uint32_t lanes) {
  Block& block = *warp.block;
  block.clocks.acquire(b.released, warp.first_thread(), lanes);
  b.previous_copy = 0;
  if (b.previous == 0) return;
  for (; lanes != 0; lanes &= lanes - 1)
    block.async.see(b.previous, block.clocks, warp.first_thread() + __builtin_ctz(lanes));
}

// operands: predicate, address, token or parity. A try_wait sleeps until its phase ends; it returns
// without success when nothing else can happen.
template <bool kTry, bool kParity>
void wait(Warp& warp, const Inst& inst, uint32_t mask) {
  Block& block = *warp.block;
  const uint32_t pc = pc_of(warp, inst);
  alignas(64) uint64_t address[kLanes];
  read_shared_addresses(warp, inst.operand + 1, address);
  uint32_t done = 0;
  for_groups(address, mask, [&](uint32_t lanes, int first) {
    Mbarrier& b = block.mbarrier(warp, pc, first, address[first]);
    uint32_t ready = 0;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const bool is = kParity ? b.parity_complete(warp.at<const uint32_t>(inst.operand[4])[l])
                              : b.is_complete(warp.at<const uint64_t>(inst.operand[4])[l]);
      ready |= (is ? 1u : 0u) << l;
    }
    if (ready != 0) pass(warp, b, ready);
    done |= ready;
    const uint32_t sleeping = kTry ? lanes & ~ready & ~warp.timed_out : 0;
    if (sleeping != 0) warp.block_on(Wait::kMbarrier, b.offset, pc, sleeping);
  });
  const uint32_t slept = kTry ? mask & ~done & ~warp.timed_out : 0;
  const uint32_t goes_on = mask & ~slept;
  warp.timed_out &= ~mask;
  // Whoever sleeps executes this again, and counts then.
  if (goes_on == 0) --block.counters->instructions;
  block.counters->lane_instructions -= static_cast<uint64_t>(std::popcount(slept));
  if (done != 0) ++block.counters->mbarrier_waits;
  if (!kTry && done != mask) warp.yields = warp.event = true;
  store_pred(warp.pred(inst.operand[0]), done, goes_on);
}

void fence_init(Warp& warp, const Inst&, uint32_t mask) {
  for (auto& [offset, b] : warp.block->mbarriers) {
    const int lane = b.init_thread - warp.first_thread();
    if (lane >= 0 && lane < kLanes && ((mask >> lane) & 1)) b.fenced = true;
  }
}

template <bool kTry>
void add_waits(OpTable& t, const std::string& name, const std::string& space) {
  for (const char* order : {"", ".acquire.cta", ".acquire.cluster"}) {
    const std::string end = order + space + ".b64";
    t.add(name + end, "p=Md", wait<kTry, false>);
    t.add(name + ".parity" + end, "p=Mr", wait<kTry, true>);
    if constexpr (kTry) {
      t.add(name + end, "p=Mdr", wait<kTry, false>);
      t.add(name + ".parity" + end, "p=Mrr", wait<kTry, true>);
    }
  }
}

}  // namespace

void add_mbarrier_ops(OpTable& t) {
  for (const char* where : {"", ".shared", ".shared::cta"}) {
    const std::string space = where;
    const std::string b64 = space + ".b64";
    t.add("mbarrier.init" + b64, "Mr", init);
    t.add("mbarrier.inval" + b64, "M", invalidate);
    for (const char* order : {"", ".release.cta", ".release.cluster"}) {
      t.add(std::string("mbarrier.arrive") + order + b64, "d=M", arrive<Arrive::kPlain, false>);
      t.add(std::string("mbarrier.arrive") + order + b64, "d=Mr", arrive<Arrive::kPlain, true>);
      t.add(std::string("mbarrier.arrive.expect_tx") + order + b64, "d=Mr",
            arrive<Arrive::kExpect, false>);
      t.add(std::string("mbarrier.arrive.noComplete") + order + b64, "d=Mr",
            arrive<Arrive::kNoComplete, true>);
    }
    for (const char* order : {"", ".relaxed.cta", ".relaxed.cluster"}) {
      t.add(std::string("mbarrier.expect_tx") + order + b64, "Mr", bytes<1>);
      t.add(std::string("mbarrier.complete_tx") + order + b64, "Mr", bytes<-1>);
    }
    add_waits<false>(t, "mbarrier.test_wait", space);
    add_waits<true>(t, "mbarrier.try_wait", space);
  }
  t.add("fence.mbarrier_init.release.cluster", "", fence_init);
}

}  // namespace ptx
