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

#include "async_ops.h"
#include "bulk.h"
#include "machine.h"
#include "mbarrier.h"
#include "memory.h"
#include "module.h"
#include "race.h"

namespace ptx {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
inline constexpr int kBarriers = 16;

struct Block;
struct Grid;
class Wgmmas;

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
  kLanes,      // at a collective that needs lanes which are not here yet
  kBarrier,    // at bar.sync
  kWarpSync,   // at bar.warp.sync
  kMbarrier,   // at mbarrier.try_wait
  kWarpgroup,  // at wgmma, for the other warps of the warpgroup
  kRegisters,  // at setmaxnreg.inc
};

struct Split {
  uint32_t pc = 0;
  uint32_t mask = 0;
  Wait wait = Wait::kNone;
  uint32_t detail = 0;  // barrier id, offset of an mbarrier, or the lanes waited for
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
  uint32_t next = 0;       // pc after this instruction; a branch changes it
  uint32_t live = 0;       // lanes that have not exited
  bool event = false;      // the handler blocked, split or ended the running split
  bool exited = false;     // lanes left since the last look
  bool yields = false;     // ends its turn: it polls
  uint32_t timed_out = 0;  // lanes whose try_wait returns without success
  uint32_t registers = 0;  // per thread, as setmaxnreg counts
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

  int first_thread() const { return index * kLanes; }

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

enum class Step { kRan, kDone, kStuck };

struct Block {
  Machine* machine = nullptr;
  const Kernel* kernel = nullptr;
  const Machine::Launch* launch = nullptr;
  Random* random = nullptr;
  Counters* counters = nullptr;
  Grid* grid = nullptr;
  bool checks = true;
  bool ordered_sums = false;
  uint32_t index[3] = {};
  uint32_t number = 0;  // of the block in the launch
  uint32_t threads = 0;
  uint32_t launch_stamp = 0;  // stamps below it belong to earlier launches
  std::vector<char> params;
  std::vector<char> shared;  // [shared_bytes]
  uint32_t shared_bytes = 0;
  SharedShadow* shadow = nullptr;  // kept between launches, its stamps stay valid
  Clocks clocks;
  AsyncOps async;
  BulkEngine bulk;
  Mbarriers mbarriers;
  std::shared_ptr<Wgmmas> wgmmas;
  BarrierState barriers[kBarriers];
  std::vector<Warp> warps;
  std::unique_ptr<char[]> register_files;
  std::vector<char> local_memory;
  std::vector<Allocation*> range_cache;  // [instructions], the allocation last used there
  // Of each thread, empty until there is one: what its last fences published, and what it has read
  // without an acquire.
  std::vector<Published> fenced;
  std::vector<Published> observed;
  int64_t register_pool = 0;  // free registers of the block, for setmaxnreg
  uint64_t progress = 0;      // grows with every event that waiting threads can see

  void prepare();                                        // buffers and constants, once per launch
  void start(const uint32_t (&id)[3], uint32_t number);  // one block
  // A turn of some warp, or a step of a copy. Stuck: nothing can go on, ever.
  Step step();
  void arrive(Warp& warp, uint32_t id, uint32_t lanes, uint32_t expected, uint32_t count,
              bool wait);
  void vote(uint32_t id, const BarrierResult& result, uint32_t set);  // before arrive
  // Splits that wait for this go on.
  void wake(Wait wait, uint32_t detail);

  // mbarriers, by lane `lane` of the warp at `pc`.
  Mbarrier& mbarrier(Warp& warp, uint32_t pc, int lane, uint64_t address);
  void mbarrier_init(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t count);
  void mbarrier_arrive(Warp& warp, uint32_t pc, uint32_t lanes, Mbarrier& b, uint32_t count);
  // Bytes are announced (positive) or arrive (negative).
  void mbarrier_bytes(Mbarrier& b, int64_t bytes);
  void mbarrier_end_phase(Mbarrier& b);  // if nothing is missing
  // The shared memory that the barrier covers is visible to a copy which this thread starts.
  void mbarrier_for_copy(Warp& warp, uint32_t pc, int lane, const Mbarrier& b);

  // Reports and aborts the launch.
  [[noreturn]] void fail(Error kind, const Warp& warp, uint32_t pc, int lane,
                         const std::string& text);
  [[noreturn]] void fail_thread(Error kind, int thread, uint32_t pc, const std::string& text) {
    fail(kind, warps[thread / kLanes], pc, thread % kLanes, text);
  }
  std::string where(uint32_t pc) const;  // "file:line" of an instruction
  // Where every warp waits, and for what.
  std::string dump() const;
  [[noreturn]] void report_stuck(const std::string& other_blocks);

 private:
  void run_warp(Warp& warp, uint64_t quantum);
  void reconverge(Warp& warp);
  bool pick_split(Warp& warp);
  void lanes_exited(Warp& warp);
  void try_release(uint32_t id);
  bool time_out_waits();
  Step end();
  void finish();
  uint32_t live_threads() const;
  std::string describe(const Warp& warp) const;
  void fill_constants(Warp& warp) const;
  void fill_specials(Warp& warp) const;

  uint64_t stuck_progress_ = 0;
  int stuck_rounds_ = 0;
};

inline uint32_t pc_of(const Warp& warp, const Inst& inst) {
  return static_cast<uint32_t>(&inst - warp.block->kernel->code.data());
}

}  // namespace ptx
