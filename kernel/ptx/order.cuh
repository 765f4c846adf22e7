// PTX that orders thread blocks among each other through global memory, at the scope of the device,
// and what they write for the host.
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
// Keep the larger or the smaller one; nothing is ordered by it.
FLASHTILE_DEVICE void red_max(int* address, int x) {
  asm volatile("red.global.max.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
FLASHTILE_DEVICE void red_min(uint32_t* address, uint32_t x) {
  asm volatile("red.global.min.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
// Returns the old value.
FLASHTILE_DEVICE int atomic_add(int* address, int x) {
  int old;
  asm volatile("atom.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(x) : "memory");
  return old;
}

// Stores `desired` where `expected` is. Returns the old value.
FLASHTILE_DEVICE int compare_and_swap(int* address, int expected, int desired) {
  int old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(address), "r"(expected), "r"(desired)
               : "memory");
  return old;
}
// Who reads the value, on the host, too, sees what this thread wrote before.
FLASHTILE_DEVICE void store_release_system(int* address, int x) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

}  // namespace flashtile::ptx
