// One function = one PTX instruction (or the two that always go together), named like it.
// Source: PTX ISA 9.0. Shared-memory addresses are uint32_t, as in PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FLASHTILE_DEVICE __device__ __forceinline__
#define FLASHTILE_HOST_DEVICE __host__ __device__ constexpr
#define FLASHTILE_UNROLL _Pragma("unroll")
#define FLASHTILE_ROLL _Pragma("unroll 1")

namespace flashtile::ptx {

// The compiler forgets what it knows about x: keeps it from hoisting, rematerialising or folding an
// address that the kernel wants in one register.
FLASHTILE_DEVICE void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }
FLASHTILE_DEVICE void opaque(int& x) { asm volatile("" : "+r"(x)); }
template <class T>
FLASHTILE_DEVICE void opaque(T*& x) {
  asm volatile("" : "+l"(x));
}

// Volatile reads: recomputed where they are written, so they hold no register across a main loop.
FLASHTILE_DEVICE int thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return static_cast<int>(x);
}
FLASHTILE_DEVICE int block_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return static_cast<int>(x);
}
FLASHTILE_DEVICE int grid_size() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(x));
  return static_cast<int>(x);
}

FLASHTILE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 2^x; flushes denormals, ex2(-inf) = 0.
FLASHTILE_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to a unit of the last place; flushes denormals, rcp(+inf) = 0.
FLASHTILE_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The smaller one, NaN if one of them is NaN.
FLASHTILE_DEVICE float min_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Two fp32 rounded to T: `low` in bits 0..15, `high` in bits 16..31.
template <class T>
FLASHTILE_DEVICE uint32_t pack(float low, float high);
template <>
FLASHTILE_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <>
FLASHTILE_DEVICE uint32_t pack<__half>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// bar.sync on barrier `id` (1..15; 0 is __syncthreads) for `threads` threads, a multiple of 32.
FLASHTILE_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FLASHTILE_DEVICE float lds_f32(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
FLASHTILE_DEVICE void sts_f32(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
FLASHTILE_DEVICE float4 lds_f32x4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
FLASHTILE_DEVICE void sts_f32x4(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}
FLASHTILE_DEVICE uint4 lds_u32x4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
FLASHTILE_DEVICE uint32_t lds_u32(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
FLASHTILE_DEVICE void sts_u32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
FLASHTILE_DEVICE void sts_u32x4(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// Adds to global memory without returning the old value; the order of additions is not defined.
FLASHTILE_DEVICE void red_add(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

}  // namespace flashtile::ptx
