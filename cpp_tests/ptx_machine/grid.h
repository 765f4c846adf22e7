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

// Where all blocks but `except` wait.
std::string dump_all(const Grid& grid, const Block* except = nullptr);

}  // namespace ptx
