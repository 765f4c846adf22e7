// PTX of compute capability 9.0. One function = one instruction. This file: registers, named
// barriers, election, stmatrix; the rest is in the files that it includes.
#pragma once

#include "common.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flashtile::ptx {

// Registers per thread of the executing warpgroup, a multiple of 8 in 24..256. All four warps
// execute it. Raising waits until other warpgroups have given enough back.
template <int kRegisters>
FLASHTILE_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLASHTILE_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Counts as one of the `threads` of named_barrier_sync() without waiting.
FLASHTILE_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in one lane of a converged warp, always the same one.
FLASHTILE_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n\t.reg .pred elected;\n\telect.sync _|elected, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, elected;\n\t}"
      : "=r"(elected));
  return elected != 0;
}

// Tells the compiler that x is the same in all lanes of the warp.
FLASHTILE_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Four 8x8 matrices of 16-bit elements, the inverse of ldmatrix_x4: lane l gives the address of row
// l%8 of matrix l/8 and elements 2(l%4), 2(l%4)+1 of row l/4 of each. _trans: transposed matrices.
FLASHTILE_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
FLASHTILE_DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace flashtile::ptx
