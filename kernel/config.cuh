// The tuning table: one row per (pass, memory class, head_dim). A row changes speed, never results.
//
// Memory classes: kLarge is 163 KB of shared memory per block and more (sm_80, sm_87, sm_90), kSmall
// is 99 KB (sm_86, sm_89, sm_120). Values come from reading the machine code (`make sass-report`).
#pragma once

#include "ptx/common.cuh"

namespace flashtile {

enum class Memory { kLarge, kSmall };

FLASHTILE_HOST_DEVICE int shared_memory_limit(Memory memory) {
  return memory == Memory::kLarge ? 163 * 1024 : 99 * 1024;
}

}  // namespace flashtile
