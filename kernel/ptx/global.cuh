// Loads from global memory of what the caller may not have: without `exists` nothing is read and 0
// comes back. What lies there does not change while a kernel runs.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

FLASHTILE_DEVICE uint32_t ldg_u8_or_zero(const void* global, bool exists) {
  uint32_t x;
  asm("{\n\t.reg .pred is;\n\tsetp.ne.s32 is, %2, 0;\n\tmov.u32 %0, 0;\n\t"
      "@is ld.global.u8 %0, [%1];\n\t}"
      : "=r"(x)
      : "l"(global), "r"(static_cast<int>(exists)));
  return x;
}
FLASHTILE_DEVICE uint16_t ldg_u16_or_zero(const void* global, bool exists) {
  uint16_t x;
  asm("{\n\t.reg .pred is;\n\tsetp.ne.s32 is, %2, 0;\n\tmov.u16 %0, 0;\n\t"
      "@is ld.global.u16 %0, [%1];\n\t}"
      : "=h"(x)
      : "l"(global), "r"(static_cast<int>(exists)));
  return x;
}
FLASHTILE_DEVICE float ldg_f32_or_zero(const void* global, bool exists) {
  float x;
  asm("{\n\t.reg .pred is;\n\tsetp.ne.s32 is, %2, 0;\n\tmov.f32 %0, 0f00000000;\n\t"
      "@is ld.global.f32 %0, [%1];\n\t}"
      : "=f"(x)
      : "l"(global), "r"(static_cast<int>(exists)));
  return x;
}

// What exists, aligned to its size.
FLASHTILE_DEVICE uint32_t ldg_u16(const void* global) {
  uint16_t x;
  asm("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(global));
  return x;
}
FLASHTILE_DEVICE uint32_t ldg_u32(const void* global) {
  uint32_t x;
  asm("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(global));
  return x;
}
FLASHTILE_DEVICE float2 ldg_f32x2(const void* global) {
  float2 x;
  asm("ld.global.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(global));
  return x;
}

}  // namespace flashtile::ptx
