// A lane's view of the mask: hides the scores of its accumulators that lie outside the band.
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

  // Scores right of the band and past the last key become -inf. `k0`: the block's first key.
  template <int kRows, int kKeys>
  FLASHTILE_DEVICE void hide_right(Accumulator<kRows, kKeys>& s, int k0) const {
    FLASHTILE_UNROLL
    for (int m = 0; m < s.kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row_end = min(end + 16 * m + 8 * half, keys) - k0;
        FLASHTILE_UNROLL
        for (int n = 0; n < s.kColBlocks; ++n) {
          FLASHTILE_UNROLL
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i >= row_end) s.d[m][n][2 * half + i] = negative_infinity();
          }
        }
      }
    }
  }

  // The same left of the band.
  template <int kRows, int kKeys>
  FLASHTILE_DEVICE void hide_left(Accumulator<kRows, kKeys>& s, int k0) const {
    FLASHTILE_UNROLL
    for (int m = 0; m < s.kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row_begin = begin + 16 * m + 8 * half - k0;
        FLASHTILE_UNROLL
        for (int n = 0; n < s.kColBlocks; ++n) {
          FLASHTILE_UNROLL
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i < row_begin) s.d[m][n][2 * half + i] = negative_infinity();
          }
        }
      }
    }
  }
};

}  // namespace flashtile
