// The mask: which keys a query sees, per element and per block of keys or queries.
//
// Every mask is one band: query q sees the keys [q + lowest, q + highest), cut to [0, seqlen_k).
// Full is a band without bounds, causal one without a lower bound. Blocks that are seen whole need
// no test; blocks that no query sees are never visited.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../ptx/common.cuh"

namespace flashtile {

FLASHTILE_HOST_DEVICE int ceil_div(int x, int y) { return x / y + (x % y > 0); }
FLASHTILE_HOST_DEVICE int min_of(int x, int y) { return x < y ? x : y; }
FLASHTILE_HOST_DEVICE int max_of(int x, int y) { return x > y ? x : y; }

// Lengths and bounds stay below this, so that their sums are ints.
inline constexpr int kLongestSequence = (1 << 30) - 512;

// Blocks that a tile visits: [begin, full_begin) tested per element, [full_begin, full_end) seen
// whole, [full_end, end) tested per element.
struct BlockRange {
  int begin, full_begin, full_end, end;

  FLASHTILE_HOST_DEVICE bool empty() const { return begin >= end; }
  FLASHTILE_HOST_DEVICE bool is_edge(int block) const {
    return block >= full_end || block < full_begin;
  }
};

struct BandMask {
  int seqlen_q, seqlen_k;
  int lowest;   // first key seen, minus the query
  int highest;  // one past the last key seen, minus the query

  FLASHTILE_HOST_DEVICE BandMask(const Band& band, int seqlen_q, int seqlen_k)
      : seqlen_q(seqlen_q), seqlen_k(seqlen_k), lowest(-kLongestSequence), highest(seqlen_k) {
    constexpr int64_t kFar = int64_t{1} << 32;  // beyond every difference of two positions
    const int64_t shift = band.top_left ? 0 : int64_t{seqlen_k} - seqlen_q;
    const int64_t left = band.left < kFar ? band.left : kFar;
    const int64_t right = band.right < kFar ? band.right : kFar;
    if (left >= 0) lowest = clamp(shift - left, kLongestSequence);
    if (right >= 0) highest = clamp(shift + right + 1, seqlen_k);
  }

  FLASHTILE_HOST_DEVICE int key_begin(int q) const { return max_of(q + lowest, 0); }
  FLASHTILE_HOST_DEVICE int key_end(int q) const { return min_of(q + highest, seqlen_k); }
  FLASHTILE_HOST_DEVICE bool visible(int q, int k) const {
    return k >= key_begin(q) && k < key_end(q);
  }
  FLASHTILE_HOST_DEVICE bool sees_no_key(int q) const { return key_end(q) <= key_begin(q); }

  // Blocks of keys that the queries [q0, q0 + block_q) see, q0 < seqlen_q.
  FLASHTILE_HOST_DEVICE BlockRange key_blocks(int q0, int block_q, int block_k) const {
    const int last = min_of(q0 + block_q, seqlen_q) - 1;
    const int first_key = key_begin(q0);
    return {.begin = first_key / block_k,
            .full_begin = ceil_div(key_begin(last), block_k),
            .full_end = max_of(key_end(q0), 0) / block_k,
            .end = first_key < seqlen_k ? ceil_div(max_of(key_end(last), 0), block_k) : 0};
  }

  // Blocks of queries that see some of the keys [k0, k0 + block_k), k0 < seqlen_k. Queries past the
  // end count as seeing everything.
  FLASHTILE_HOST_DEVICE BlockRange query_blocks(int k0, int block_k, int block_q) const {
    const int last = min_of(k0 + block_k, seqlen_k) - 1;
    const int see_first_until = k0 - lowest + 1;  // queries below this see the first key
    BlockRange range;
    range.end = ceil_div(min_of(max_of(last - lowest + 1, 0), seqlen_q), block_q);
    range.begin = min_of(max_of(k0 - highest + 1, 0) / block_q, range.end);
    range.full_begin = ceil_div(max_of(last - highest + 1, 0), block_q);
    range.full_end = see_first_until >= seqlen_q ? range.end : max_of(see_first_until, 0) / block_q;
    range.full_begin = min_of(max_of(range.full_begin, range.begin), range.end);
    range.full_end = max_of(range.full_end, range.full_begin);
    if (k0 + block_k > seqlen_k)
      range.full_end = range.full_begin;  // keys past the end: all tested
    return range;
  }

 private:
  static FLASHTILE_HOST_DEVICE int clamp(int64_t x, int64_t limit) {
    return static_cast<int>(x < -kLongestSequence ? -kLongestSequence : x > limit ? limit : x);
  }
};

}  // namespace flashtile
