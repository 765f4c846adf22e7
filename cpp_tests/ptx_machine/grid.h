// The blocks of a launch: which of them run side by side, and what they tell each other through
// global memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "warp.h"

namespace ptx {

struct Grid {
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  std::vector<bool> running;
  // What was released to a word of global memory, by address.
  std::unordered_map<uint64_t, std::shared_ptr<const Foreign>> released;
};

std::string hex(uint32_t x);  // "0x0000ffff"
// Where all blocks but `except` wait.
std::string dump_all(const Grid& grid, const Block* except = nullptr);

// How a memory instruction orders others. Anything but kWeak is no race with an atomic update.
enum Order : int32_t { kWeak = 0, kRelaxed = 1, kAcquire = 3, kRelease = 5, kAcquireRelease = 7 };
inline bool acquires(int32_t order) { return (order & 2) != 0; }
inline bool releases(int32_t order) { return (order & 4) != 0; }

// Lanes wrote (changed: atom and red) these words: what they release is there to be acquired.
void release_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order,
                   bool changed);
// Lanes read these words; without acquire, a later fence acquires.
void acquire_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order);
// fence.acq_rel and stronger, membar.
void fence_order(Warp& warp, uint32_t mask);
// The warp may be polling: others go first.
void yield_poll(Warp& warp);

}  // namespace ptx
