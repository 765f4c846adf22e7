// PTX of compute capability 9.0: additions to global memory by vectors.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// Four neighbouring floats, 16-byte aligned; the order of additions is not defined.
FLASHTILE_DEVICE void red_add(float* address, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

}  // namespace flashtile::ptx
