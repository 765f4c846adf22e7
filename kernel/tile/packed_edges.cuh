// A lane's view of the mask where rows of a tile are heads of a query, then those of the next one.
#pragma once

#include "accumulator.cuh"
#include "constants.cuh"
#include "mask.cuh"

namespace flashtile {

// The keys that the lane's two rows see, counted from its first column of key 0.
struct PackedEdges {
  int begin[2];
  uint32_t count[2];

  // Row r of the tile is query (row0 + r) / group; it sees nothing from packed row `rows` on.
  FLASHTILE_DEVICE PackedEdges(const BandMask& mask, int row0, int rows, int group, int lane) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + accumulator_row(lane, 0, 2 * half);
      const int first = mask.key_begin(row / group);
      begin[half] = first - accumulator_col(lane, 0, 0);
      count[half] = row < rows ? max(mask.key_end(row / group) - first, 0) : 0;
    }
  }

  // Scores of keys that are not seen become -inf. `k0`: the key of column 0.
  template <int kKeys>
  FLASHTILE_DEVICE void mask(Accumulator<16, kKeys>& s, int k0) const {
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2;
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n) {
        const auto key = static_cast<uint32_t>(k0 - begin[half] + n * 8 + i % 2);
        if (key >= count[half]) s.d[0][n][i] = negative_infinity();
      }
    }
  }
};

}  // namespace flashtile
