// Packing: rows of a tensor, in any layout and any storage format, become right operands of gemm.h.
#pragma once

#include "gemm.h"
#include "sequence.h"
#include "storage.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// One stage of a transposition: swaps the off-diagonal kHalf x kHalf blocks of each pair of rows.
template <class C, int kHalf, int... kLane>
FLASHTILE_INLINE void swap_blocks(Vec<C>& a, Vec<C>& b) {
  constexpr int kWidth = kLanes<C>;
  const Vec<C> low =
      __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? kWidth + kLane - kHalf : kLane)...);
  const Vec<C> high =
      __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? kWidth + kLane : kLane + kHalf)...);
  a = low;
  b = high;
}

template <class C, int kHalf>
FLASHTILE_INLINE void swap_blocks_of(Vec<C>& a, Vec<C>& b) {
  if constexpr (kLanes<C> == 2) {
    swap_blocks<C, kHalf, 0, 1>(a, b);
  } else if constexpr (kLanes<C> == 4) {
    swap_blocks<C, kHalf, 0, 1, 2, 3>(a, b);
  } else if constexpr (kLanes<C> == 8) {
    swap_blocks<C, kHalf, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
  } else {
    static_assert(kLanes<C> == 16);
    swap_blocks<C, kHalf, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
  }
}

// Transposes a square of kLanes x kLanes held in registers.
template <class C, int kHalf = kLanes<C> / 2>
FLASHTILE_INLINE void transpose(Vec<C> (&rows)[kLanes<C>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<C>; ++i) {
    if ((i & kHalf) == 0) swap_blocks_of<C, kHalf>(rows[i], rows[i + kHalf]);
  }
  if constexpr (kHalf > 1) transpose<C, kHalf / 2>(rows);
}

// Rows become columns: to is panels [count / kPanel][dim][kPanel] of factor * row, zeros for the
// columns behind `count` in the last panel.
template <class Source, class C = Compute<typename Source::Number>>
void pack_transposed(Source rows, int64_t count, int64_t dim, C factor, C* to) {
  constexpr int kWidth = kLanes<C>;
  for (int64_t column = 0; column < round_up(count, kPanel<C>); column += kWidth) {
    C* panel = to + round_down(column, kPanel<C>) * dim + column % kPanel<C>;
    for (int64_t d = 0; d < dim; d += kWidth) {
      Vec<C> square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        square[i] =
            column + i < count ? read_some(rows.row(column + i) + d, dim - d) * factor : Vec<C>{};
      }
      transpose<C>(square);
      const int64_t wanted = smaller_of(kWidth, dim - d);
      for (int i = 0; i < wanted; ++i) store(panel + (d + i) * kPanel<C>, square[i]);
    }
  }
}

// Rows stay rows: to is panels [round_up(dim, kPanel) / kPanel][count][kPanel], zeros for the
// columns behind `dim`. Returns whether every number was finite.
template <class Source, class C = Compute<typename Source::Number>>
bool pack_rows(Source rows, int64_t count, int64_t dim, C* to) {
  constexpr int kWidth = kLanes<C>;
  Vec<C> zero{};  // stays zero unless something was inf or NaN
  for (int64_t i = 0; i < count; ++i) {
    const auto* row = rows.row(i);
    for (int64_t d = 0; d < round_up(dim, kPanel<C>); d += kWidth) {
      const Vec<C> v = read_some(row + d, dim - d);
      zero += v * C{0};
      store(to + (round_down(d, kPanel<C>) * count + i * kPanel<C> + d % kPanel<C>), v);
    }
  }
  return sum_of_lanes<C>(zero) == 0;
}

// A row-major copy with rows padded to `to.stride` and zero rows up to a multiple of kTileRows.
// Returns whether every number was finite.
template <class T>
bool copy_rows(Rows<const T> rows, int64_t count, int64_t dim, Compute<T> factor,
               Matrix<Compute<T>> to) {
  using C = Compute<T>;
  constexpr int kWidth = kLanes<C>;
  Vec<C> zero{};
  for (int64_t i = 0; i < count; ++i) {
    widen(rows.row(i), dim, factor, to.row(i), to.stride);
    for (int64_t d = 0; d < to.stride; d += kWidth) zero += load(to.row(i) + d) * C{0};
  }
  for (int64_t i = count; i < round_up(count, kTileRows); ++i) {
    for (int64_t d = 0; d < to.stride; d += kWidth) store(to.row(i) + d, Vec<C>{});
  }
  return sum_of_lanes<C>(zero) == 0;
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
