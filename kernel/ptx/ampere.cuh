// PTX of compute capability 8.0: cp.async, ldmatrix, mma.sync. One function = one instruction.
// Every memory instruction clobbers "memory": without it the compiler moves loads across waits.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// 16 bytes global -> shared, past L1.
FLASHTILE_DEVICE void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// The same; without a source 16 zeros, and nothing is read.
FLASHTILE_DEVICE void cp_async_16_or_zero(uint32_t shared, const void* global, bool has_source) {
  asm volatile(
      "{\n\t.reg .pred ignore;\n\tsetp.eq.s32 ignore, %2, 0;\n\t"
      "cp.async.cg.shared.global [%0], [%1], 16, ignore;\n\t}" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(has_source))
      : "memory");
}
FLASHTILE_DEVICE void cp_async_4_or_zero(uint32_t shared, const void* global, bool has_source) {
  asm volatile(
      "{\n\t.reg .pred ignore;\n\tsetp.eq.s32 ignore, %2, 0;\n\t"
      "cp.async.ca.shared.global [%0], [%1], 4, ignore;\n\t}" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(has_source))
      : "memory");
}
FLASHTILE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FLASHTILE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8 and
// receives elements 2(l%4), 2(l%4)+1 of row l/4 of each. _trans: of the transposed matrices.
FLASHTILE_DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
FLASHTILE_DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// d = a b + c: a 16x16 (row), b 16x8 (col), c and d 16x8 fp32.
// Lane l, g = l/4, t = l%4: d[0..1] = row g, columns 2t, 2t+1; d[2..3] = row g+8.
template <class T>
FLASHTILE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   const float (&c)[4]);
template <>
FLASHTILE_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1, const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
template <>
FLASHTILE_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1, const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

}  // namespace flashtile::ptx
