// Products of tiles with mma.sync m16n8k16: A from shared memory or registers, B from shared
// memory.
#pragma once

#include "../ptx/ampere.cuh"
#include "accumulator.cuh"
#include "smem_tile.cuh"

namespace flashtile {

// A warp's rows of a tile as A operands, read where they are used: `bytes` behind their kRowsFirst
// addresses.
template <class Address, int kRows>
struct SharedOperand {
  Address address;
  int bytes = 0;

  FLASHTILE_DEVICE void load() {}
  FLASHTILE_DEVICE void get(uint32_t (&a)[4], int m, int k) const {
    ptx::ldmatrix_x4(a, address.at(16 * m, k, bytes));
  }
};

// The same, read once and kept in registers.
template <class Address, int kRows>
struct RegisterOperand {
  static constexpr int kSteps = Address::Tile::kCols / 16;
  Address address;
  int bytes = 0;
  uint32_t x[kRows / 16][kSteps][4];  // pairs of 16-bit elements

  FLASHTILE_DEVICE explicit RegisterOperand(const Address& address, int bytes = 0)
      : address(address), bytes(bytes) {}
  FLASHTILE_DEVICE void load() {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      FLASHTILE_UNROLL
      for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(x[m][k], address.at(16 * m, k, bytes));
    }
  }
  FLASHTILE_DEVICE void get(uint32_t (&a)[4], int m, int k) const {
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = x[m][k][i];
  }
};

// c += a b for one 16 x 16 block of A and the two n8 tiles that one ldmatrix_x4 brings.
template <class T, int kRows, int kCols>
FLASHTILE_DEVICE void mma_pair(Accumulator<kRows, kCols>& c, int m, int n, const uint32_t (&a)[4],
                               const uint32_t (&b)[4]) {
  ptx::mma_m16n8k16<T>(c.d[m][2 * n], a, b[0], b[1], c.d[m][2 * n]);
  ptx::mma_m16n8k16<T>(c.d[m][2 * n + 1], a, b[2], b[3], c.d[m][2 * n + 1]);
}

struct StartFromZero {
  FLASHTILE_DEVICE float4 operator()(int) const { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
};

// c = a b^T + start: b is a tile stored [n, k], `b_bytes` behind the kColsFirst addresses `b`.
// start(n) is n8 tile n of the start, the same for all row blocks.
template <class T, class Operand, class Address, int kRows, int kCols, class Start = StartFromZero>
FLASHTILE_DEVICE void mma_ABt(Accumulator<kRows, kCols>& c, const Operand& a, const Address& b,
                              int b_bytes = 0, const Start& start = {}) {
  FLASHTILE_UNROLL
  for (int k = 0; k < Address::Tile::kCols / 16; ++k) {
    uint32_t a_k[kRows / 16][4];
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) a.get(a_k[m], m, k);
    FLASHTILE_UNROLL
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t b_nk[4];
      ptx::ldmatrix_x4(b_nk, b.at(16 * n, k, b_bytes));
      if (k == 0) {
        const float4 first = start(2 * n), second = start(2 * n + 1);
        FLASHTILE_UNROLL
        for (int m = 0; m < kRows / 16; ++m) {
          assign(c.d[m][2 * n], first);
          assign(c.d[m][2 * n + 1], second);
        }
      }
      FLASHTILE_UNROLL
      for (int m = 0; m < kRows / 16; ++m) mma_pair<T>(c, m, n, a_k[m], b_nk);
    }
  }
}

// c += a b for 16 columns of A, in registers, and rows 16 * k of b, a tile stored [k, n], `b_bytes`
// behind the kRowsFirst addresses `b`.
template <class T, class Address, int kRows, int kCols>
FLASHTILE_DEVICE void mma_AB_step(Accumulator<kRows, kCols>& c, const uint32_t (&a)[kRows / 16][4],
                                  const Address& b, int k, int b_bytes = 0) {
  FLASHTILE_UNROLL
  for (int n = 0; n < kCols / 16; ++n) {
    uint32_t b_kn[4];
    ptx::ldmatrix_x4_trans(b_kn, b.at(16 * k, n, b_bytes));
    FLASHTILE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) mma_pair<T>(c, m, n, a[m], b_kn);
  }
}

}  // namespace flashtile
