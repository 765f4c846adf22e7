// Products of small matrices held in registers, the only place where multiplications happen.
//
// The left operand is row-major (or, transposed, column-major) with any stride. The right operand
// is packed in panels of kPanel columns, panel[depth][kPanel], so that the inner loop reads it in
// order. Sums start at zero and are added to the result at the end: that keeps a long chain of
// additions from rounding against a large accumulator.
#pragma once

#include "vec.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// Register tile: kTileRows x kTileVecs vectors of sums, chosen to fill the register file (16
// registers up to AVX2, 32 with AVX-512) with room for the operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;
template <class C>
constexpr int kPanel = kTileVecs * kLanes<C>;

enum class Left { kRowMajor, kTransposed };

// c[r][0..kPanel) = (kAdd ? c : 0) + sum over k < depth of a(r, k) * panel[k], for r < kRows, where
// a(r, k) is a[r * lda + k], or a[k * lda + r] when transposed.
template <class C, int kRows, Left kLeft, bool kAdd>
[[gnu::noinline]] void multiply_tile(const C* a, int64_t lda, const C* panel, int64_t depth, C* c,
                                     int64_t ldc) {
  constexpr int kWidth = kLanes<C>;
  Vec<C> sum[kRows][kTileVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) sum[r][v] = Vec<C>{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> right[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) right[v] = load(panel + k * kPanel<C> + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<C> left = splat(kLeft == Left::kRowMajor ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) {
      C* to = c + r * ldc + v * kWidth;
      if constexpr (kAdd) sum[r][v] += load(to);
      store(to, sum[r][v]);
    }
  }
}

// A row-major matrix in scratch memory.
template <class C>
struct Matrix {
  C* data;
  int64_t stride;
  // data is null only while an Arena measures; no row is read then.
  // NOLINTNEXTLINE(clang-analyzer-core.NullPointerArithm)
  FLASHTILE_INLINE C* row(int64_t r) const { return data + r * stride; }
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
