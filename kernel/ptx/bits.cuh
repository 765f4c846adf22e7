// PTX on the bits of a register.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// x << n for any n >= 0: 0 from 32 on.
FLASHTILE_DEVICE uint32_t shift_left(uint32_t x, int n) {
  uint32_t y;
  asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(n));
  return y;
}

// Four bytes out of low (0 to 3) and high (4 to 7), one per hexadecimal digit of `selector`; a
// digit of 8 more stands for eight copies of that byte's highest bit.
template <uint32_t kSelector>
FLASHTILE_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "n"(kSelector));
  return y;
}

}  // namespace flashtile::ptx
