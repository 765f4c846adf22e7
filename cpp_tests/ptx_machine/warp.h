// The state of running kernels: lanes, warps, blocks, and what instruction handlers need from them.
//
// A warp executes one instruction for all lanes of its running split; the other splits (lanes at
// another pc) wait in `others`. The split with the lowest pc runs, splits merge where their pcs
// meet.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "module.h"
#include "race.h"

namespace ptx {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
inline constexpr int kBarriers = 16;

struct Block;

// Deterministic per seed (splitmix64).
struct Random {
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

// Unwinds a launch after a report was made.
struct LaunchAborted {};

enum class Wait : uint8_t {
  kNone,
  kLanes,     // at a collective that needs lanes which are not here yet
  kBarrier,   // at bar.sync
  kWarpSync,  // at bar.warp.sync
};

struct Split {
  uint32_t pc = 0;
  uint32_t mask = 0;
  Wait wait = Wait::kNone;
  uint32_t detail = 0;  // barrier id, or the lanes waited for
};

// One thread's cp.async that it has not waited for.
struct PendingCopy {
  uint32_t offset = 0;  // of the destination in shared memory
  uint32_t bytes = 0;   // written; the last `zeroed` of them with zeros
  uint32_t copied = 0;
  const char* source = nullptr;
  uint32_t group = 0;
  bool landed = false;
};

struct LaneCopies {
  std::vector<PendingCopy> pending;
  uint32_t committed = 0;  // groups committed so far; also the number of the open group
};

struct Warp {
  char* regs = nullptr;  // register file, 64-byte aligned
  uint32_t pc = 0;       // of the running split; mask 0: no split is running
  uint32_t mask = 0;
  uint32_t next = 0;    // pc after this instruction; a branch changes it
  uint32_t live = 0;    // lanes that have not exited
  bool event = false;   // the handler blocked, split or ended the running split
  bool exited = false;  // lanes left since the last look
  int index = 0;
  Block* block = nullptr;
  std::vector<Split> others;
  LaneCopies copies[kLanes];
  uint64_t executed = 0;  // warp instructions
  char* local = nullptr;  // [kLanes][local_bytes]

  template <class T>
  T* at(int32_t offset) {
    return reinterpret_cast<T*>(regs + offset);
  }
  uint32_t& pred(int32_t offset) { return *reinterpret_cast<uint32_t*>(regs + offset); }

  // False when all `lanes` are `present` at this instruction. Otherwise those present wait here
  // until the others come, and the handler returns without effect.
  bool needs_lanes(uint32_t present, uint32_t lanes) {
    if ((present & lanes) == lanes) return false;
    wait_for_lanes(present, lanes);
    return true;
  }
  void wait_for_lanes(uint32_t present, uint32_t lanes);
  // These lanes leave the running split and wait; they go on at `resume_pc`.
  void block_on(Wait wait, uint32_t detail, uint32_t resume_pc, uint32_t lanes);
  bool has_runnable() const;
};

// Where a warp's lanes get what a reducing barrier found.
struct BarrierResult {
  Warp* warp;
  int32_t predicate;  // its place in the registers
  uint32_t lanes;
  bool is_or;
};

struct BarrierState {
  uint32_t expected = 0;     // threads; 0: all of the block
  uint32_t count = 0;        // arrived, counted as the hardware does: 32 for a warp
  std::vector<int> arrived;  // threads at bar.arrive and bar.sync
  std::vector<int> waiting;  // threads at bar.sync
  std::vector<BarrierResult> results;
  bool any = false, all = true;  // over the predicates given so far
};

struct Block {
  Machine* machine = nullptr;
  const Kernel* kernel = nullptr;
  const Machine::Launch* launch = nullptr;
  Random* random = nullptr;
  Counters* counters = nullptr;
  bool checks = true;
  uint32_t index[3] = {};
  uint32_t threads = 0;
  uint32_t launch_stamp = 0;  // stamps below it belong to earlier launches
  uint32_t block_stamp = 0;   // stamps below it belong to other blocks
  std::vector<char> params;
  std::vector<char> shared;  // [shared_bytes]
  uint32_t shared_bytes = 0;
  SharedShadow& shadow = shared_shadow();  // kept between launches, its stamps stay valid
  Clocks clocks;
  BarrierState barriers[kBarriers];
  std::vector<Warp> warps;
  std::unique_ptr<char[]> register_files;
  std::vector<char> local_memory;
  std::vector<Allocation*> range_cache;  // [instructions], the allocation last used there

  void prepare();                       // buffers and constants, once per launch
  void start(const uint32_t (&id)[3]);  // one block
  void run();
  void arrive(Warp& warp, uint32_t id, uint32_t lanes, uint32_t expected, uint32_t count,
              bool wait);
  void vote(uint32_t id, const BarrierResult& result, uint32_t set);  // before arrive

  // Reports and aborts the launch.
  [[noreturn]] void fail(Error kind, const Warp& warp, uint32_t pc, int lane,
                         const std::string& text);
  std::string where(uint32_t pc) const;  // "file:line" of an instruction

 private:
  static SharedShadow& shared_shadow();
  void run_warp(Warp& warp, uint64_t quantum);
  void reconverge(Warp& warp);
  bool pick_split(Warp& warp);
  void lanes_exited(Warp& warp);
  void try_release(uint32_t id);
  uint32_t live_threads() const;
  std::string describe(const Warp& warp) const;
  [[noreturn]] void report_stuck();
  void fill_constants(Warp& warp) const;
  void fill_specials(Warp& warp) const;
};

inline uint32_t pc_of(const Warp& warp, const Inst& inst) {
  return static_cast<uint32_t>(&inst - warp.block->kernel->code.data());
}

}  // namespace ptx
