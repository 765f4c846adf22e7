// The blocks of a launch: which of them run side by side, and what they tell each other through
// global memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "warp.h"

namespace ptx {

struct Grid {
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  std::vector<bool> running;
  std::unordered_map<uint64_t, Published> released;  // to a word of global memory, by address
};

std::string hex(uint32_t x);  // "0x0000ffff"
// Where all blocks but `except` wait.
std::string dump_all(const Grid& grid, const Block* except = nullptr);

// How a memory instruction or a fence orders others. Anything but kWeak is no race with an atomic
// update. kInBlock: of scope .cta, which reaches no thread of another block.
enum Order : int32_t { kWeak = 0, kRelaxed = 1, kAcquire = 3, kRelease = 5, kAcquireRelease = 7 };
inline constexpr int32_t kInBlock = 8;
inline bool acquires(int32_t order) { return (order & 2) != 0; }
inline bool releases(int32_t order) { return (order & 4) != 0; }
inline bool is_in_block(int32_t order) { return (order & kInBlock) != 0; }
inline uint8_t how_of(int32_t order) {
  if (order == kWeak) return 0;
  return is_in_block(order) ? uint8_t{kStrong | kBlockScope} : uint8_t{kStrong};
}
// The scopes of PTX, as modifiers.
inline constexpr std::pair<const char*, int32_t> kScopes[] = {
    {".cta", kInBlock}, {".gpu", 0}, {".sys", 0}};

// Lanes wrote (changed: atom and red) these words: what they release is there to be acquired.
void release_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order,
                   bool changed);
// Lanes read these words; without acquire, a later fence acquires.
void acquire_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order);
// fence and membar.
void fence_order(Warp& warp, uint32_t mask, int32_t order);
// The warp may be polling: others go first.
void yield_poll(Warp& warp);

}  // namespace ptx
