// wgmma: asynchronous products of a warpgroup. Four warps meet at each wgmma.mma_async; the product
// is computed then, and delivered to a warp's registers when that warp waits for its group. Until
// then the accumulators hold signalling NaNs, and no thread may touch them or the registers of A.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "tensor_map.h"

namespace ptx {

struct Block;
struct Inst;
struct Warp;

inline constexpr int kGroupWarps = 4;

// A matrix of 16-bit elements in shared memory, as a descriptor and the instruction describe it.
struct Descriptor {
  uint32_t start = 0;    // shared address
  uint32_t leading = 0;  // byte offsets, see chunk()
  uint32_t stride = 0;
  uint32_t base = 0;  // row of the swizzle's pattern at which the matrix begins
  Swizzle swizzle = Swizzle::kNone;
  bool mn_major = false;

  static Descriptor decode(uint64_t bits, bool mn_major);
  static bool is_legal(uint64_t bits);
  // Shared address of 8 elements. K-major: row `line`, columns 8 chunk .. 8 chunk + 7. MN-major:
  // rows 8 chunk .. of column `line`.
  uint32_t chunk(uint32_t line, uint32_t chunk) const;
};

// What one wgmma.mma_async says.
struct WgmmaOp {
  int n = 0;
  bool bf16 = false;
  bool a_in_registers = false;
  const int32_t* accumulators = nullptr;  // [n / 2] places
  const int32_t* a_registers = nullptr;   // [4] places
  Descriptor a, b;
  bool accumulate = false;
  float scale_a = 1, scale_b = 1;
};

class Wgmmas {
 public:
  explicit Wgmmas(Block& block);
  void start();

  void fence(Warp& warp);
  // One warp is at this instruction; the last of the four executes it for all.
  void multiply(Warp& warp, uint32_t pc, const WgmmaOp& op);
  void commit(Warp& warp);
  void wait(Warp& warp, uint32_t pc, uint32_t allowed);
  // A product that its warp has not waited for: its pc, or -1.
  int unfinished(int& thread) const;

 private:
  // Accumulators in flight: one set of registers of a warpgroup.
  struct Chain {
    std::vector<int32_t> places;
    int n = 0;
    std::vector<float> values;                     // [64][n]
    std::array<bool, kGroupWarps> in_flight = {};  // per warp
    std::array<uint32_t, kGroupWarps> group = {};  // the last group that writes them
    uint32_t pc = 0;
  };
  struct HeldA {  // registers of A that a product in flight reads
    std::array<int32_t, 4> places;
    std::array<std::array<uint32_t, 32>, 4> values;
    uint32_t group = 0;
    uint32_t pc = 0;
  };
  struct Lane {  // of one warp
    uint32_t committed = 0;
    bool fenced = false;
    bool here = false;  // waits at a wgmma
    uint32_t pc = 0;
    WgmmaOp op;
    std::vector<char> snapshot;  // of the registers of wgmmas, at the last fence
    std::vector<HeldA> held;
  };
  struct Group {
    uint32_t number = 0;
    uint32_t completion = 0;
  };
  struct Warpgroup {
    std::array<Lane, kGroupWarps> lanes;
    std::vector<std::unique_ptr<Chain>> chains;
    std::deque<Group> groups;
  };

  void execute(Warpgroup& wg, int first_warp, uint32_t pc);
  Chain& chain_of(Warpgroup& wg, Warp& warp, uint32_t pc, const WgmmaOp& op);
  void begin_chain(Warpgroup& wg, Chain& chain, int w, Warp& warp, uint32_t pc);
  void check_fenced(Lane& lane, Warp& warp, uint32_t pc, int32_t place, const char* what);
  // One product as its four warps issue it.
  struct Issue {
    const WgmmaOp* op;
    int first_warp;
    uint32_t pc;
    uint32_t completion;
  };
  void load_a(Warpgroup& wg, const Issue& issue, float* a);
  void load_shared(const Descriptor& d, uint32_t rows, const Issue& issue, float* to);
  void deliver(Warp& warp, Lane& lane, Chain& chain, int w);

  Block& block_;
  std::deque<Warpgroup> groups_;
  std::vector<float> a_, b_;
};

// values[64][n] = a[64][16] b[16][n] (+ values).
void wgmma_product(const float* a, const float* b, float* values, int n, bool accumulate);

}  // namespace ptx
