// Masks: which keys a query sees, per element and per block of keys.
//
// A mask says for every query the range of keys it sees; all the rest follows from that. Blocks of
// keys in [full_begin, full_end) are seen whole by every query of a tile and need no test.
#pragma once

#include <concepts>

#include "../ptx/common.cuh"

namespace flashtile {

// Blocks of keys that a tile of queries visits: [begin, full_begin) tested per element,
// [full_begin, full_end) seen whole, [full_end, end) tested per element.
struct KvRange {
  int begin, full_begin, full_end, end;

  FLASHTILE_HOST_DEVICE bool empty() const { return begin >= end; }
  FLASHTILE_HOST_DEVICE bool is_edge(int block) const {
    return block >= full_end || block < full_begin;
  }
};

FLASHTILE_HOST_DEVICE int ceil_div(int x, int y) { return x / y + (x % y > 0); }
FLASHTILE_HOST_DEVICE int min_of(int x, int y) { return x < y ? x : y; }
FLASHTILE_HOST_DEVICE int max_of(int x, int y) { return x > y ? x : y; }

// key_begin(q), key_end(q): query q sees the keys in [key_begin, key_end), both within [0,
// seqlen_k] for q < seqlen_q; an empty range may be given as key_end <= key_begin.
template <class Mask>
concept MaskPolicy = requires(const Mask mask, int q) {
  { Mask::kHasBegin } -> std::convertible_to<bool>;  // false: key_begin is 0 for every query
  { mask.key_begin(q) } -> std::same_as<int>;
  { mask.key_end(q) } -> std::same_as<int>;
};

struct FullMask {
  static constexpr bool kHasBegin = false;
  int seqlen_q, seqlen_k;

  FLASHTILE_HOST_DEVICE int key_begin(int) const { return 0; }
  FLASHTILE_HOST_DEVICE int key_end(int) const { return seqlen_k; }
};

// Query i sees key j when j <= i + seqlen_k - seqlen_q: aligned at the bottom right corner.
struct CausalMask {
  static constexpr bool kHasBegin = false;
  int seqlen_q, seqlen_k;

  FLASHTILE_HOST_DEVICE int key_begin(int) const { return 0; }
  FLASHTILE_HOST_DEVICE int key_end(int q) const { return q - seqlen_q + seqlen_k + 1; }
};

template <MaskPolicy Mask>
FLASHTILE_HOST_DEVICE bool visible(const Mask& mask, int q, int k) {
  return k < mask.key_end(q) && (!Mask::kHasBegin || k >= mask.key_begin(q));
}

template <MaskPolicy Mask>
FLASHTILE_HOST_DEVICE bool sees_no_key(const Mask& mask, int q) {
  return mask.key_end(q) <= mask.key_begin(q);
}

// For queries [q0, q0 + block_q), q0 < seqlen_q. key_begin and key_end grow with q.
template <MaskPolicy Mask>
FLASHTILE_HOST_DEVICE KvRange key_blocks(const Mask& mask, int q0, int block_q, int block_k) {
  const int last = q0 + min_of(block_q, mask.seqlen_q - q0) - 1;
  KvRange range;
  range.begin = mask.key_begin(q0) / block_k;
  range.end = ceil_div(max_of(mask.key_end(last), 0), block_k);
  range.full_begin = Mask::kHasBegin ? ceil_div(mask.key_begin(last), block_k) : range.begin;
  range.full_end = max_of(mask.key_end(q0), 0) / block_k;
  return range;
}

}  // namespace flashtile
