// PTX of compute capability 9.0: wgmma, d += a b by one warpgroup, asynchronously.
//
// Warp w of the warpgroup holds rows 16 w to 16 w + 15 of the 64 x N result, each lane as
// mma_m16n8k16 leaves it: d[n] are its four values of columns 8 n to 8 n + 7. Between issue and
// wgmma_wait() neither d nor an A operand in registers may be touched.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// wgmma_fence(): before the first wgmma of a batch and after other writes to its registers.
FLASHTILE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FLASHTILE_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
FLASHTILE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After the wait: the compiler may not move reads of d before it.
template <int kBlocks>
FLASHTILE_DEVICE void keep_in_order(float (&d)[kBlocks][4]) {
  FLASHTILE_UNROLL
  for (int n = 0; n < kBlocks; ++n) {
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

// Where an operand lies in shared memory, in the 128-byte swizzle of smem_tile.cuh: 8 rows of 128
// bytes are 1024 bytes, the stride between groups of rows.
//
//   bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride / 16, 62-63 swizzle (1: 128 B)
//
// K-major (Q and K of Q K^T): rows are m or n, 16 of k are 32 bytes further, the leading offset is
// not used. MN-major (V of P V): rows are k, 16 of k are 2048 bytes further, the leading offset
// leads to the next 64 columns: the panel's size.
// The upper word is the same for all; the lower one is kept, and moved by bytes / 16.
inline constexpr uint32_t kDescriptorHigh = 1u << 30 | 1024 / 16;
FLASHTILE_DEVICE uint32_t descriptor_low(uint32_t address, uint32_t leading_bytes) {
  return (address & 0x3ffffu) >> 4 | leading_bytes / 16 << 16;
}
FLASHTILE_DEVICE uint64_t descriptor(uint32_t low) {
  return static_cast<uint64_t>(kDescriptorHigh) << 32 | low;
}

// Which dimension of an operand is contiguous in shared memory.
enum class Major { kK = 0, kMn = 1 };

template <class T, int kN>
struct Wgmma;

// The registers of a result of R = N / 2 floats, as text and as operands.
// clang-format off
#define FLASHTILE_TEXT_16 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASHTILE_TEXT_32 FLASHTILE_TEXT_16 \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASHTILE_TEXT_40 FLASHTILE_TEXT_32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39"
#define FLASHTILE_TEXT_48 FLASHTILE_TEXT_40 \
  ",%40,%41,%42,%43,%44,%45,%46,%47"
#define FLASHTILE_TEXT_56 FLASHTILE_TEXT_48 \
  ",%48,%49,%50,%51,%52,%53,%54,%55"
#define FLASHTILE_TEXT_64 FLASHTILE_TEXT_56 \
  ",%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASHTILE_TEXT_96 FLASHTILE_TEXT_64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FLASHTILE_TEXT_128 FLASHTILE_TEXT_96 \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FLASHTILE_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FLASHTILE_OPERANDS_16 \
  FLASHTILE_D(0), FLASHTILE_D(1), FLASHTILE_D(2), FLASHTILE_D(3)
#define FLASHTILE_OPERANDS_32 FLASHTILE_OPERANDS_16, \
  FLASHTILE_D(4), FLASHTILE_D(5), FLASHTILE_D(6), FLASHTILE_D(7)
#define FLASHTILE_OPERANDS_40 FLASHTILE_OPERANDS_32, \
  FLASHTILE_D(8), FLASHTILE_D(9)
#define FLASHTILE_OPERANDS_48 FLASHTILE_OPERANDS_40, \
  FLASHTILE_D(10), FLASHTILE_D(11)
#define FLASHTILE_OPERANDS_56 FLASHTILE_OPERANDS_48, \
  FLASHTILE_D(12), FLASHTILE_D(13)
#define FLASHTILE_OPERANDS_64 FLASHTILE_OPERANDS_56, \
  FLASHTILE_D(14), FLASHTILE_D(15)
#define FLASHTILE_OPERANDS_96 FLASHTILE_OPERANDS_64, \
  FLASHTILE_D(16), FLASHTILE_D(17), FLASHTILE_D(18), FLASHTILE_D(19), FLASHTILE_D(20), FLASHTILE_D(21), FLASHTILE_D(22), FLASHTILE_D(23)
#define FLASHTILE_OPERANDS_128 FLASHTILE_OPERANDS_96, \
  FLASHTILE_D(24), FLASHTILE_D(25), FLASHTILE_D(26), FLASHTILE_D(27), FLASHTILE_D(28), FLASHTILE_D(29), FLASHTILE_D(30), FLASHTILE_D(31)
// clang-format on

// One shape for one format. r0 to r6: the numbers of the operands behind the R registers.
#define FLASHTILE_WGMMA(N, T, FORMAT, R, r0, r1, r2, r3, r4, r5, r6)                             \
  template <>                                                                                    \
  struct Wgmma<T, N> {                                                                           \
    template <Major kA, Major kB>                                                                \
    FLASHTILE_DEVICE static void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) { \
      asm volatile(                                                                              \
          "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #r2                                       \
          ", 0;\n\t"                                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT "." FORMAT                    \
          " {" FLASHTILE_TEXT_##R "}, %" #r0 ", %" #r1 ", add, 1, 1, %" #r3 ", %" #r4 ";\n\t}"   \
          : FLASHTILE_OPERANDS_##R                                                               \
          : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB)));     \
    }                                                                                            \
    template <Major kB>                                                                          \
    FLASHTILE_DEVICE static void registers(float (&d)[N / 8][4], const uint32_t (&a)[4],         \
                                           uint64_t b, int add) {                                \
      asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #r5                              \
                   ", 0;\n\t"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT "." FORMAT           \
                   " {" FLASHTILE_TEXT_##R "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4  \
                                           ", add, 1, 1, %" #r6 ";\n\t}"                         \
                   : FLASHTILE_OPERANDS_##R                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add),               \
                     "n"(static_cast<int>(kB)));                                                 \
    }                                                                                            \
  };
#define FLASHTILE_WGMMA_BOTH(N, ...)             \
  FLASHTILE_WGMMA(N, __half, "f16", __VA_ARGS__) \
  FLASHTILE_WGMMA(N, __nv_bfloat16, "bf16", __VA_ARGS__)
FLASHTILE_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
FLASHTILE_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
FLASHTILE_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45, 46)
FLASHTILE_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53, 54)
FLASHTILE_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61, 62)
FLASHTILE_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
FLASHTILE_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
FLASHTILE_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef FLASHTILE_WGMMA_BOTH
#undef FLASHTILE_WGMMA
#undef FLASHTILE_D
#undef FLASHTILE_TEXT_16
#undef FLASHTILE_OPERANDS_16
#undef FLASHTILE_TEXT_32
#undef FLASHTILE_OPERANDS_32
#undef FLASHTILE_TEXT_40
#undef FLASHTILE_OPERANDS_40
#undef FLASHTILE_TEXT_48
#undef FLASHTILE_OPERANDS_48
#undef FLASHTILE_TEXT_56
#undef FLASHTILE_OPERANDS_56
#undef FLASHTILE_TEXT_64
#undef FLASHTILE_OPERANDS_64
#undef FLASHTILE_TEXT_96
#undef FLASHTILE_OPERANDS_96
#undef FLASHTILE_TEXT_128
#undef FLASHTILE_OPERANDS_128

// d = a b, or d += a b when `add`: a 64 x 16 and b 16 x N from shared memory, by descriptors.
template <class T, Major kA, Major kB, int kBlocks>
FLASHTILE_DEVICE void wgmma(float (&d)[kBlocks][4], uint64_t a, uint64_t b, bool add) {
  Wgmma<T, 8 * kBlocks>::template shared<kA, kB>(d, a, b, add);
}
// The same with a in registers, as the A operand of mma_m16n8k16 for each warp's 16 rows.
template <class T, Major kB, int kBlocks>
FLASHTILE_DEVICE void wgmma(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<T, 8 * kBlocks>::template registers<kB>(d, a, b, add);
}

}  // namespace flashtile::ptx
