// What both forwards do with a warp's rows of O when all keys have been seen.
#pragma once

#include "accumulator.cuh"
#include "constants.cuh"
#include "softmax.cuh"
#include "work.cuh"

namespace flashtile {

// A row without keys, or not in use, is 0, also where a value that its neighbours see is NaN.
template <int kRows, int kCols>
FLASHTILE_DEVICE void clear_row(Accumulator<kRows, kCols>& o, int m, int half, float& factor) {
  factor = 0.0f;
  FLASHTILE_UNROLL
  for (int n = 0; n < o.kColBlocks; ++n) o.d[m][n][2 * half] = o.d[m][n][2 * half + 1] = 0.0f;
}

// A lane of the warp whose rows of the tile begin at `row`.
struct WarpLane {
  int row, lane;
};

// What O is multiplied with, row by row: 1 / row sum.
template <int kRows>
struct RowFactors {
  float of[kRows / 16][2];
  FLASHTILE_DEVICE float operator()(int m, int half) const { return of[m][half]; }
};

// Stores the LSE, if it is wanted, and clears the rows of O that see no key.
template <int kRows, int kCols>
FLASHTILE_DEVICE RowFactors<kRows> finish_rows(const Problem& problem, const RowView& lse,
                                               const RowBlock& work, const WarpLane& warp,
                                               Accumulator<kRows, kCols>& o,
                                               const OnlineSoftmax<kRows>& softmax) {
  const Sequence& sequence = work.sequence;
  const BandMask mask = band_mask(problem, sequence);
  float* const lse_rows = row_address(lse, sequence, sequence.row_q, work.head) + work.row0;
  RowFactors<kRows> factors;
  for_each_row<kRows>([&](int m, int half) {
    const int row = warp.row + accumulator_row(warp.lane, m, 2 * half);
    const float sum = softmax.row_sum(m, half);
    const int query = work.row0 + row;
    const bool empty = query >= sequence.seqlen_q || mask.sees_no_key(query);
    factors.of[m][half] = 1.0f / sum;
    if (empty) clear_row(o, m, half, factors.of[m][half]);
    if (lse.data != nullptr && warp.lane % 4 == 0 && row < work.owned) {
      lse_rows[row] = empty ? negative_infinity() : softmax.logsumexp(m, half, sum);
    }
  });
  return factors;
}

}  // namespace flashtile
