// Runs one block: which warp goes on, which of its splits, barriers, and what to say when nothing
// can.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "warp.h"

namespace ptx {

namespace {

constexpr size_t kAlign = 256;

std::string hex(uint32_t x) {
  char buffer[16];
  std::snprintf(buffer, sizeof(buffer), "0x%08x", x);
  return buffer;
}

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

SharedShadow& Block::shared_shadow() {
  static SharedShadow shadow;
  return shadow;
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

void Block::start(const uint32_t (&id)[3]) {
  std::copy(id, id + 3, index);
  std::memset(shared.data(), 0xFF, shared.size());
  clocks.start(static_cast<int>(threads));
  block_stamp = clocks.own(0);
  if (checks) shadow.start(shared_bytes, static_cast<int>(threads));
  for (BarrierState& b : barriers) b = {};
  for (Warp& warp : warps) {
    const uint32_t lanes =
        std::min<uint32_t>(kLanes, threads - static_cast<uint32_t>(warp.index) * kLanes);
    warp.live = warp.mask = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.pc = 0;
    warp.executed = 0;
    warp.event = warp.exited = false;
    warp.others.clear();
    for (LaneCopies& c : warp.copies) {
      c.pending.clear();
      c.committed = 0;
    }
    fill_specials(warp);
  }
  ++counters->blocks;
}

void Block::run() {
  std::vector<int> runnable;
  for (;;) {
    runnable.clear();
    bool alive = false;
    for (const Warp& warp : warps) {
      alive |= warp.live != 0;
      if (warp.has_runnable()) runnable.push_back(warp.index);
    }
    if (!alive) return;
    if (runnable.empty()) report_stuck();
    Warp& warp = warps[runnable[random->below(static_cast<uint32_t>(runnable.size()))]];
    const uint32_t longest = (random->next() & 3) == 0 ? 64 : 4096;
    run_warp(warp, 1 + random->below(longest));
  }
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
             " instructions without an end; it may spin on memory that another block writes, which "
             "this "
             "machine runs before or after this one");
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
  for (Warp& warp : warps) {
    for (Split& s : warp.others) {
      if (s.wait == Wait::kBarrier && s.detail == id) s.wait = Wait::kNone;
    }
  }
}

std::string Block::where(uint32_t pc) const {
  if (pc >= kernel->sites.size()) return "the end of the kernel";
  const Site& site = kernel->sites[pc];
  std::string text;
  const auto& files = kernel->module->files;
  const auto add = [&](int file, int line) {
    const auto it = files.find(file);
    const std::string path = it == files.end() ? "?" : it->second;
    text += path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  };
  if (site.line > 0) {
    add(site.file, site.line);
    if (site.outer_line > 0) {
      text += " (from ";
      add(site.outer_file, site.outer_line);
      text += ')';
    }
    text += ", ";
  }
  return text + "PTX line " + std::to_string(site.ptx_line) + " " + std::string(site.opcode);
}

std::string Block::describe(const Warp& warp) const {
  std::string text;
  for (const Split& s : warp.others) {
    const bool barrier = s.wait == Wait::kBarrier;
    const char* what = s.wait == Wait::kLanes      ? "wait for lanes "
                       : barrier                   ? "wait at barrier "
                       : s.wait == Wait::kWarpSync ? "wait at bar.warp.sync for lanes "
                                                   : "can run ";
    if (!text.empty()) text += "; ";
    text += "lanes " + hex(s.mask) + " " + what;
    if (barrier)
      text += std::to_string(s.detail);
    else if (s.wait != Wait::kNone)
      text += hex(s.detail);
    // A barrier or warp barrier resumes behind itself.
    text += " at " + where(barrier || s.wait == Wait::kWarpSync ? s.pc - 1 : s.pc);
  }
  return text.empty() ? "exited" : text;
}

void Block::report_stuck() {
  std::string text = "no warp can go on";
  const Warp* stuck = nullptr;
  uint32_t pc = 0;
  for (const Warp& warp : warps) {
    text += "\n    warp " + std::to_string(warp.index) + ": " + describe(warp);
    if (stuck == nullptr && !warp.others.empty()) {
      stuck = &warp;
      const Split& s = warp.others.front();
      pc = s.wait == Wait::kLanes ? s.pc : s.pc - 1;
    }
  }
  for (int id = 0; id < kBarriers; ++id) {
    const BarrierState& b = barriers[id];
    if (b.arrived.empty()) continue;
    text +=
        "\n    barrier " + std::to_string(id) + ": " + std::to_string(b.arrived.size()) +
        " threads arrived, " +
        (b.expected != 0 ? std::to_string(b.expected) : "all " + std::to_string(live_threads())) +
        " expected";
  }
  const Warp& at = stuck != nullptr ? *stuck : warps.front();
  fail(Error::kDeadlock, at, pc, at.others.empty() ? 0 : __builtin_ctz(at.others.front().mask),
       text);
}

}  // namespace ptx
