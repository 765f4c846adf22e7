// One warp's fp32 tile, as mma.m16n8k16 leaves it in registers.
//
// Lane l, g = l / 4, t = l % 4, of each 16 x 8 block:
//
//             columns 2t, 2t+1
//   row g     d[0]  d[1]          Two neighbouring blocks (16 x 16), rounded to 16 bits, are one A
//   row g+8   d[2]  d[3]          operand: P = softmax(S) goes into P V without shared memory.
#pragma once

#include "../ptx/common.cuh"

namespace flashtile {

template <int kRowsValue, int kColsValue>
struct Accumulator {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kRowBlocks = kRows / 16;
  static constexpr int kColBlocks = kCols / 8;
  float d[kRowBlocks][kColBlocks][4];  // fp32
};

// Row of d[m][..][i] and column of d[..][n][i] within the warp's tile.
FLASHTILE_HOST_DEVICE int accumulator_row(int lane, int m, int i) {
  return m * 16 + i / 2 * 8 + lane / 4;
}
FLASHTILE_HOST_DEVICE int accumulator_col(int lane, int n, int i) {
  return n * 8 + lane % 4 * 2 + i % 2;
}

// Calls body(m, half) for each of a lane's rows, 16 m + 8 half + lane / 4.
template <int kRows, class Body>
FLASHTILE_DEVICE void for_each_row(const Body& body) {
  FLASHTILE_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) body(m, half);
  }
}

// Calls body(d, m, n, i) for each element d[m][n][i].
template <int kRows, int kCols, class Body>
FLASHTILE_DEVICE void for_each(Accumulator<kRows, kCols>& x, const Body& body) {
  FLASHTILE_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) body(x.d[m][n][i], m, n, i);
    }
  }
}

template <int kRows, int kCols>
FLASHTILE_DEVICE void clear(Accumulator<kRows, kCols>& x) {
  x = {};
}

FLASHTILE_DEVICE void assign(float (&d)[4], const float4& x) {
  d[0] = x.x;
  d[1] = x.y;
  d[2] = x.z;
  d[3] = x.w;
}

// The A operand made of the 16 x 16 block at row block m, columns 16 * k.
template <class T, int kRows, int kCols>
FLASHTILE_DEVICE void to_operand(uint32_t (&a)[4], const Accumulator<kRows, kCols>& x, int m,
                                 int k) {
  a[0] = ptx::pack<T>(x.d[m][2 * k][0], x.d[m][2 * k][1]);
  a[1] = ptx::pack<T>(x.d[m][2 * k][2], x.d[m][2 * k][3]);
  a[2] = ptx::pack<T>(x.d[m][2 * k + 1][0], x.d[m][2 * k + 1][1]);
  a[3] = ptx::pack<T>(x.d[m][2 * k + 1][2], x.d[m][2 * k + 1][3]);
}

}  // namespace flashtile
