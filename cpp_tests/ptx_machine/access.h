// Checked access of a warp to memory: address resolution, bounds, alignment, shadows, counters.
#pragma once

#include "warp.h"

namespace ptx {

enum class Space { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };
enum class Access { kRead, kWrite, kAtomic };

// One memory instruction of a warp: `bytes` per lane at address[l]. resolve() fills host[l].
struct Request {
  Warp* warp = nullptr;
  uint32_t pc = 0;
  uint32_t mask = 0;
  uint32_t bytes = 0;
  Access access = Access::kRead;
  uint8_t how = 0;  // flags of How
  alignas(64) uint64_t address[kLanes];
  char* host[kLanes];
};

// The addresses of an M operand: base register + displacement.
void read_addresses(Warp& warp, const int32_t* operand, uint64_t (&address)[kLanes]);

// Checks every lane of the mask and finds its host pointer; reports and aborts on an error.
void resolve(Request& request, Space space);

// Global part of a cp.async: `bytes` of lane `lane` at `address`, already counted by count_global.
const char* resolve_global(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes,
                           Access access, uint8_t how = 0);
const char* verb(Access access);

// Shared part: bounds and alignment only; the byte offset in the block's shared memory.
uint32_t shared_offset(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes);

void count_global(Block& block, const uint64_t* address, uint32_t mask, uint32_t bytes, bool write);
// Wavefronts of shared memory for 16-byte rows are counted per 8 lanes, 8-byte ones per 16.
void count_shared(Block& block, const uint64_t* address, uint32_t mask, uint32_t bytes);

// Reports the conflict that block.shadow found.
[[noreturn]] void fail_shadow(Warp& warp, uint32_t pc, int lane, Access access);
[[noreturn]] void fail_shadow(Warp& warp, uint32_t pc, int lane, const char* what);

}  // namespace ptx
