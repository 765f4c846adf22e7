// Runs one block: which warp goes on, which of its splits, barriers, and what must be over at the
// end.
#include <algorithm>
#include <bit>
#include <cstring>

#include "grid.h"
#include "warp.h"
#include "wgmma.h"

namespace ptx {

namespace {

constexpr size_t kAlign = 256;

}  // namespace

void Warp::wait_for_lanes(uint32_t present, uint32_t lanes) {
  const uint32_t gone = lanes & ~live;
  if (gone != 0) {
    block->fail(Error::kDivergence, *this, pc, __builtin_ctz(present),
                "this instruction needs lanes " + hex(lanes) + " of the warp together; lanes " +
                    hex(gone) + " have exited or do not exist");
  }
  block_on(Wait::kLanes, lanes, pc, present);
}

void Warp::block_on(Wait wait, uint32_t detail, uint32_t resume_pc, uint32_t lanes) {
  others.push_back({resume_pc, lanes, wait, detail});
  mask &= ~lanes;
  event = true;
}

bool Warp::has_runnable() const {
  return mask != 0 || std::any_of(others.begin(), others.end(),
                                  [](const Split& s) { return s.wait == Wait::kNone; });
}

void Block::prepare() {
  const uint32_t count = (threads + kLanes - 1) / kLanes;
  const size_t file = kernel->register_bytes;
  register_files = std::make_unique<char[]>(file * count + kAlign);
  char* base = register_files.get();
  base += (kAlign - reinterpret_cast<uintptr_t>(base) % kAlign) % kAlign;
  local_memory.resize(static_cast<size_t>(kernel->local_bytes) * count * kLanes);
  warps.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    warps[i].regs = base + file * i;
    warps[i].index = static_cast<int>(i);
    warps[i].block = this;
    warps[i].local = local_memory.data() + static_cast<size_t>(kernel->local_bytes) * kLanes * i;
    fill_constants(warps[i]);
  }
  shared.resize(shared_bytes);
  wgmmas = std::make_shared<Wgmmas>(*this);
  range_cache.assign(kernel->code.size(), nullptr);
}

void Block::fill_constants(Warp& warp) const {
  for (const Constant& c : kernel->constants) {
    for (int l = 0; l < kLanes; ++l) {
      if (c.wide)
        warp.at<uint64_t>(c.offset)[l] = c.value;
      else
        warp.at<uint32_t>(c.offset)[l] = static_cast<uint32_t>(c.value);
    }
  }
}

void Block::fill_specials(Warp& warp) const {
  const auto axis = [](char c, const uint32_t (&v)[3]) { return v[c - 'x']; };
  for (const Special& s : kernel->specials) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t t = static_cast<uint32_t>(warp.index) * kLanes + l;
      const uint32_t (&n)[3] = launch->block;
      const uint32_t tid[3] = {t % n[0], t / n[0] % n[1], t / n[0] / n[1]};
      const char last = s.name.back();
      uint64_t value = 0;
      if (s.name.starts_with("%tid."))
        value = axis(last, tid);
      else if (s.name.starts_with("%ntid."))
        value = axis(last, n);
      else if (s.name.starts_with("%ctaid."))
        value = axis(last, index);
      else if (s.name.starts_with("%nctaid."))
        value = axis(last, launch->grid);
      else if (s.name == "%laneid")
        value = l;
      else if (s.name == "%warpid")
        value = static_cast<uint32_t>(warp.index);
      else if (s.name == "%nwarpid")
        value = warps.size();
      else if (s.name == "%nsmid")
        value = static_cast<uint32_t>(machine->device().sm_count);
      else if (s.name == "%lanemask_eq")
        value = 1u << l;
      else if (s.name == "%lanemask_lt")
        value = (1u << l) - 1;
      else if (s.name == "%lanemask_le")
        value = (2ull << l) - 1;
      else if (s.name == "%lanemask_gt")
        value = ~((2ull << l) - 1);
      else if (s.name == "%lanemask_ge")
        value = ~((1u << l) - 1);
      else if (s.name == "%dynamic_smem_size")
        value = launch->dynamic_shared;
      else if (s.name == "%total_smem_size")
        value = shared_bytes;
      if (s.wide)
        warp.at<uint64_t>(s.offset)[l] = value;
      else
        warp.at<uint32_t>(s.offset)[l] = static_cast<uint32_t>(value);
    }
  }
}

void Block::start(const uint32_t (&id)[3], uint32_t block_number) {
  std::copy(id, id + 3, index);
  number = block_number;
  std::memset(shared.data(), 0xFF, shared.size());
  const int count = static_cast<int>(threads);
  clocks.start(count, number);
  async.start(count);
  bulk.start(this, count);
  mbarriers.clear();
  wgmmas->start();
  register_pool = 0;
  fenced.clear();
  observed.clear();
  stuck_rounds_ = 0;
  if (checks) shadow->start(shared_bytes, count, &async);
  for (BarrierState& b : barriers) b = {};
  for (Warp& warp : warps) {
    const uint32_t lanes =
        std::min<uint32_t>(kLanes, threads - static_cast<uint32_t>(warp.index) * kLanes);
    warp.live = warp.mask = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.pc = 0;
    warp.executed = 0;
    warp.event = warp.exited = warp.yields = false;
    warp.timed_out = 0;
    warp.registers = kernel->launch_registers;
    warp.others.clear();
    for (LaneCopies& c : warp.copies) {
      c.pending.clear();
      c.committed = 0;
    }
    fill_specials(warp);
  }
  ++counters->blocks;
}

Step Block::step() {
  bool alive = false;
  uint32_t runnable = 0;
  for (const Warp& warp : warps) {
    alive |= warp.live != 0;
    runnable += warp.has_runnable() ? 1 : 0;
  }
  if (!alive) return end();
  // Copies land at any time, and at the latest when nothing else can happen.
  if (!bulk.idle() && (runnable == 0 || (random->next() & 3) == 0)) {
    bulk.step();
    return Step::kRan;
  }
  if (runnable == 0) {
    if (time_out_waits()) return Step::kRan;
    return Step::kStuck;
  }
  uint32_t pick = random->below(runnable);
  const uint32_t longest = (random->next() & 3) == 0 ? 64 : 4096;
  for (Warp& warp : warps) {
    if (!warp.has_runnable() || pick-- != 0) continue;
    run_warp(warp, 1 + random->below(longest));
    break;
  }
  return Step::kRan;
}

// All threads have exited. Stores that were read land later.
Step Block::end() {
  if (const BulkCopy* copy = bulk.unread_store())
    fail_thread(Error::kInFlight, copy->thread, copy->pc,
                "the block ends before this copy has read its shared memory: no wait_group");
  if (!bulk.idle()) {
    if ((random->next() & 7) == 0) bulk.step();
    return Step::kRan;
  }
  finish();
  return Step::kDone;
}

// A try_wait may give up. Only when nothing else can happen, and only as long as that brings
// something about: waits that fail again and again are a deadlock.
bool Block::time_out_waits() {
  constexpr int kRounds = 4;
  stuck_rounds_ = progress == stuck_progress_ ? stuck_rounds_ + 1 : 0;
  stuck_progress_ = progress;
  if (stuck_rounds_ >= kRounds) return false;
  bool any = false;
  for (Warp& warp : warps) {
    for (Split& s : warp.others) {
      if (s.wait != Wait::kMbarrier) continue;
      s.wait = Wait::kNone;
      warp.timed_out |= s.mask;
      any = true;
    }
  }
  return any;
}

void Block::wake(Wait wait, uint32_t detail) {
  for (Warp& warp : warps) {
    for (Split& s : warp.others) {
      if (s.wait == wait && (s.detail == detail || wait == Wait::kRegisters)) s.wait = Wait::kNone;
    }
  }
}

// What must not be left behind when all threads have exited.
void Block::finish() {
  for (const auto& [offset, b] : mbarriers) {
    const std::string name = "the mbarrier at offset " + std::to_string(offset);
    if (b.bytes != 0)
      fail_thread(Error::kBarrier, b.init_thread, b.init_pc,
                  name + " ends with " + std::to_string(b.bytes) + " bytes: expect_tx announced " +
                      (b.bytes > 0 ? "more than arrived" : "less than arrived"));
    const uint32_t pc = b.copy_pc != 0 ? b.copy_pc : b.previous_copy;
    if (pc != 0)
      fail_thread(Error::kInFlight, b.copy_thread, pc,
                  "the block ends and nobody has waited at " + name + " for this copy");
  }
  int thread = 0;
  const int pc = wgmmas->unfinished(thread);
  if (pc >= 0)
    fail_thread(Error::kWgmma, thread, static_cast<uint32_t>(pc),
                "the block ends and its thread has not waited for this wgmma");
}

void Block::run_warp(Warp& warp, uint64_t quantum) {
  const Inst* code = kernel->code.data();
  uint64_t lanes = 0;
  uint64_t left = quantum;
  if (warp.mask == 0 && !pick_split(warp)) return;
  while (left-- > 0) {
    const Inst& inst = code[warp.pc];
    uint32_t mask = warp.mask;
    warp.next = warp.pc + 1;
    if (inst.guard >= 0) mask &= warp.pred(inst.guard) ^ inst.guard_flip;
    lanes += static_cast<uint64_t>(std::popcount(mask));
    if (mask != 0) inst.run(warp, inst, mask);
    warp.pc = warp.next;
    if (warp.event || !warp.others.empty()) {
      reconverge(warp);
      if (warp.mask == 0) break;
      if (warp.yields) {
        warp.yields = false;
        break;
      }
    }
  }
  const uint64_t done = quantum - (left == ~uint64_t{0} ? 0 : left);
  warp.executed += done;
  counters->instructions += done;
  counters->lane_instructions += lanes;
  if (warp.executed > machine->budget()) {
    const uint32_t pc = warp.mask != 0 ? warp.pc : 0;
    fail(Error::kLivelock, warp, pc, warp.mask != 0 ? __builtin_ctz(warp.mask) : 0,
         "the warp has executed " + std::to_string(warp.executed) +
             " instructions without an end; it may spin on memory that a block writes which does "
             "not run beside this one (set_resident_blocks)" +
             dump_all(*grid));
  }
}

// After an instruction that changed the splits, or while there are several: merge what meets, and
// let the lowest pc run.
void Block::reconverge(Warp& warp) {
  if (warp.event) {
    warp.event = false;
    lanes_exited(warp);
    if (warp.mask != 0) {
      warp.others.push_back({warp.pc, warp.mask, Wait::kNone, 0});
      warp.mask = 0;
    }
    pick_split(warp);
    return;
  }
  bool meets = false;
  for (const Split& s : warp.others) {
    meets |=
        (s.pc == warp.pc && s.wait <= Wait::kLanes) || (s.pc < warp.pc && s.wait == Wait::kNone);
  }
  if (!meets) return;
  warp.others.push_back({warp.pc, warp.mask, Wait::kNone, 0});
  warp.mask = 0;
  pick_split(warp);
}

bool Block::pick_split(Warp& warp) {
  const Split* lowest = nullptr;
  for (const Split& s : warp.others) {
    if (s.wait == Wait::kNone && (lowest == nullptr || s.pc < lowest->pc)) lowest = &s;
  }
  if (lowest == nullptr) {
    // Lanes that wait for each other at different instructions never meet.
    const bool hopeless = !warp.others.empty() &&
                          std::all_of(warp.others.begin(), warp.others.end(), [](const Split& s) {
                            return s.wait == Wait::kLanes || s.wait == Wait::kWarpSync;
                          });
    if (hopeless) {
      const Split& first = warp.others.front();
      fail(Error::kDivergence, warp, first.pc, __builtin_ctz(first.mask),
           "the lanes of this warp wait for each other at different instructions: " +
               describe(warp));
    }
    return false;
  }
  const uint32_t pc = lowest->pc;
  warp.pc = pc;
  for (const Split& s : warp.others) {
    if (s.pc == pc && s.wait <= Wait::kLanes) warp.mask |= s.mask;
  }
  std::erase_if(warp.others, [pc](const Split& s) { return s.pc == pc && s.wait <= Wait::kLanes; });
  return true;
}

// Fewer lanes may complete a barrier, or make a wait hopeless: let the waiting instructions look
// again.
void Block::lanes_exited(Warp& warp) {
  if (!warp.exited) return;
  warp.exited = false;
  for (Split& s : warp.others) {
    if (s.wait == Wait::kLanes) s.wait = Wait::kNone;
  }
  for (uint32_t id = 0; id < kBarriers; ++id) try_release(id);
}

uint32_t Block::live_threads() const {
  uint32_t count = 0;
  for (const Warp& warp : warps) count += static_cast<uint32_t>(std::popcount(warp.live));
  return count;
}

void Block::arrive(Warp& warp, uint32_t id, uint32_t lanes, uint32_t expected, uint32_t count,
                   bool wait) {
  BarrierState& b = barriers[id];
  const uint32_t pc = warp.pc;
  const int lane = __builtin_ctz(lanes);
  if (!b.arrived.empty() && b.expected != expected) {
    fail(Error::kDivergence, warp, pc, lane,
         "barrier " + std::to_string(id) + " is used with " + std::to_string(expected) +
             " threads while others wait with " + std::to_string(b.expected) +
             " (0: the whole block)");
  }
  b.expected = expected;
  b.count += count;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int thread = warp.index * kLanes + __builtin_ctz(rest);
    b.arrived.push_back(thread);
    if (wait) b.waiting.push_back(thread);
  }
  if (expected != 0 && b.count > expected) {
    fail(Error::kDivergence, warp, pc, lane,
         "barrier " + std::to_string(id) + ": more than the expected " + std::to_string(expected) +
             " threads arrive");
  }
  try_release(id);
}

void Block::vote(uint32_t id, const BarrierResult& result, uint32_t set) {
  BarrierState& b = barriers[id];
  b.any = b.any || set != 0;
  b.all = b.all && set == result.lanes;
  b.results.push_back(result);
}

void Block::try_release(uint32_t id) {
  BarrierState& b = barriers[id];
  if (b.arrived.empty()) return;
  const bool complete =
      b.expected != 0 ? b.count == b.expected : b.arrived.size() >= live_threads();
  if (!complete) return;
  if (b.waiting.size() == threads)
    clocks.join_all();
  else
    clocks.join(b.arrived, b.waiting);
  for (const BarrierResult& result : b.results) {
    uint32_t& predicate = result.warp->pred(result.predicate);
    const bool value = result.is_or ? b.any : b.all;
    predicate = value ? predicate | result.lanes : predicate & ~result.lanes;
  }
  b = {};
  ++progress;
  wake(Wait::kBarrier, id);
}

}  // namespace ptx
