// Which scores of S^T a lane may use, as masks of pairs of 16-bit elements: P^T and dS^T are masked
// where they are packed, so that what stands at a hidden place (infinite, NaN) becomes 0.
#pragma once

#include "backward/sm90_shape.cuh"
#include "ptx/bits.cuh"

namespace flashtile {

// The band, as a lane of the warpgroups sees it: of two keys of the block, `key` and key + 8.
struct LaneBand {
  int begin;  // first query that sees the first key, minus the lane's first query of the block
  int end;    // one past the last one
  int keys;   // of the block that are in use, minus key

  // `q0`: first query of the block.
  FLASHTILE_DEVICE LaneBand(const BandNotes& notes, int q0, int thread) {
    const int lane = thread % 32;
    const int key = thread / 32 * 16 + lane / 4;
    begin = key + notes.begin - (q0 + lane % 4 * 2);
    end = key + notes.end - (q0 + lane % 4 * 2);
    keys = notes.keys - key;
  }
};

// In a block of 8 * kBlocks queries. A lane holds queries 8 n and 8 n + 1 (on from its first one)
// of both keys; key + 8 is seen by the query 8 further on. Bits 6 and 7 of byte m + 1 say whether
// queries 8 m and 8 m + 1 see the first key; m counts from -1.
template <int kBlocks>
struct SeenPairs {
  static constexpr int kWords = kBlocks / 4 + 1;
  uint32_t seen[kWords];
  uint32_t key[2];  // all bits: the key is in use

  SeenPairs() = default;
  FLASHTILE_DEVICE explicit SeenPairs(const LaneBand& band) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const int begin = max(band.begin + 8 - 32 * i, 0);
      const int end = max(band.end + 8 - 32 * i, 0);
      seen[i] = (ptx::shift_left(~0u, begin) & ~ptx::shift_left(~0u, end)) << 6;
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
    const uint32_t odd = seen[byte / 4], even = odd << 1;
    const uint32_t both = byte % 4 == 0   ? spread<0>(even, odd)
                          : byte % 4 == 1 ? spread<1>(even, odd)
                          : byte % 4 == 2 ? spread<2>(even, odd)
                                          : spread<3>(even, odd);
    return both & key[half];
  }
};

}  // namespace flashtile
