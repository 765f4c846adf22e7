// A lane's view of the mask: finds the scores of its accumulators that lie outside the band.
#pragma once

#include "accumulator.cuh"
#include "constants.cuh"
#include "mask.cuh"

namespace flashtile {

// Where the edges of the band cross the lane's first row, counted from the lane's first column of
// block 0. The other rows are a constant further down, the other blocks a multiple to the right.
struct BandEdges {
  int begin;  // first column seen
  int end;    // one past the last one, as far as the band goes
  int keys;   // one past the last key

  // `q0`: this warp's first query.
  FLASHTILE_DEVICE BandEdges(const BandMask& mask, int q0, int lane) {
    const int query = q0 + accumulator_row(lane, 0, 0);
    const int column = accumulator_col(lane, 0, 0);
    begin = query + mask.lowest - column;
    end = query + mask.highest - column;
    keys = mask.seqlen_k - column;
  }

  // Scores outside of the band, and those of keys past the last one, become -inf. `block`: which
  // block of kKeys keys; `range` says at which edges it can have such scores.
  template <int kRows, int kKeys>
  FLASHTILE_DEVICE void mask(Accumulator<kRows, kKeys>& s, const BlockRange& range,
                             int block) const {
    const int k0 = block * kKeys;
    if (block >= range.full_end) {
      mask_columns(
          s, [&](int row) { return min(end + row, keys) - k0; },
          [](int column, int row_end) { return column >= row_end; });
    }
    if (block < range.full_begin) {
      mask_columns(
          s, [&](int row) { return begin + row - k0; },
          [](int column, int row_begin) { return column < row_begin; });
    }
  }

 private:
  template <int kRows, int kKeys, class EdgeOf, class IsOutside>
  FLASHTILE_DEVICE static void mask_columns(Accumulator<kRows, kKeys>& s, const EdgeOf& edge_of,
                                            const IsOutside& is_outside) {
    for_each_row<kRows>([&](int m, int half) {
      const int edge = edge_of(16 * m + 8 * half);
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (is_outside(n * 8 + i, edge)) s.d[m][n][2 * half + i] = negative_infinity();
        }
      }
    });
  }
};

}  // namespace flashtile
