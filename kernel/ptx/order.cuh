// PTX that orders thread blocks among each other through global memory, at the scope of the device.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// Everything before the release, of all threads that met the releasing one at a barrier, is seen by
// those that meet the acquiring one at a barrier after it has read the released value.
FLASHTILE_DEVICE int atomic_add_acquire(int* address, int x) {
  int old;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(x)
               : "memory");
  return old;
}
FLASHTILE_DEVICE void red_max_release(int* address, int x) {
  asm volatile("red.release.gpu.global.max.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
// Returns the old value.
FLASHTILE_DEVICE int atomic_add(int* address, int x) {
  int old;
  asm volatile("atom.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(x) : "memory");
  return old;
}

}  // namespace flashtile::ptx
