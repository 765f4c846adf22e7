// Which scores of S^T a lane may use, as masks of pairs of 16-bit elements: P^T and dS^T are masked
// where they are packed, so that what stands at a hidden place (infinite, NaN) becomes 0.
#pragma once

#include "ptx/bits.cuh"
#include "tile/mask.cuh"

namespace flashtile {

// The band, as a lane of the warpgroups sees it: its keys are `key` and key + 8 of the block.
struct LaneBand {
  int begin;  // first query that sees key `key`, minus the first query of the lane, see the ctor
  int end;    // one past the last one
  int keys;   // of the block that are in use, minus key

  FLASHTILE_DEVICE LaneBand(const BandMask& mask, int k0, int keys_in_use, int key, int lane)
      : begin(k0 + key - mask.highest + 1 - lane % 4 * 2),
        end(k0 + key - mask.lowest + 1 - lane % 4 * 2),
        keys(keys_in_use - key) {}
};

// In a block of 8 * kBlocks queries. A lane holds queries 8 n and 8 n + 1 (on from its first one) of
// both keys; key + 8 is seen by the query 8 further on. Byte m + 1 of `even` and `odd` says in its
// highest bit whether queries 8 m and 8 m + 1 see the first key; m counts from -1.
template <int kBlocks>
struct SeenPairs {
  static constexpr int kWords = kBlocks / 4 + 1;
  uint32_t even[kWords], odd[kWords];
  uint32_t key[2];  // all bits: the key is in use

  FLASHTILE_DEVICE SeenPairs(const LaneBand& band, int q0) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const int begin = max(band.begin - q0 + 8 - 32 * i, 0);
      const int end = max(band.end - q0 + 8 - 32 * i, 0);
      const uint32_t seen = ptx::shift_left(~0u, begin) & ~ptx::shift_left(~0u, end);
      even[i] = seen << 7;
      odd[i] = seen << 6;
    }
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) key[half] = 8 * half < band.keys ? ~0u : 0u;
  }

  // Of n8 block n: for the first key (half 0) or the second.
  template <int kByte>
  static FLASHTILE_DEVICE uint32_t spread(uint32_t even, uint32_t odd) {
    return ptx::permute_bytes<(0xc + kByte) * 0x1100 + (0x8 + kByte) * 0x11>(even, odd);
  }
  FLASHTILE_DEVICE uint32_t pair(int n, int half) const {
    const int byte = n + 1 - half;
    const uint32_t x = even[byte / 4], y = odd[byte / 4];
    const uint32_t seen = byte % 4 == 0   ? spread<0>(x, y)
                          : byte % 4 == 1 ? spread<1>(x, y)
                          : byte % 4 == 2 ? spread<2>(x, y)
                                          : spread<3>(x, y);
    return seen & key[half];
  }
};

}  // namespace flashtile
