// Which keys a query sees (params.h, Band), as two diagonals over a block of queries and keys.
#pragma once

#include "params.h"
#include "vec.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// [begin, end) of rows or columns.
struct Range {
  int64_t begin;
  int64_t end;
  FLASHTILE_INLINE bool empty() const { return end <= begin; }
};

FLASHTILE_INLINE int64_t clamp(int64_t n, int64_t most) {
  return smaller_of(larger_of(n, 0), most);
}

// All bits set in the lanes of a vector that starts at `at` and lie in the range.
template <class C>
FLASHTILE_INLINE IntVec<C> lanes_in(const Range& range, int64_t at) {
  using Integer = typename VecTypes<C>::Integer;
  const IntVec<C> lane = lane_numbers<C>();
  return (lane >= static_cast<Integer>(range.begin - at)) &
         (lane < static_cast<Integer>(range.end - at));
}

// Query i of the block sees key j of the block when i + first <= j < i + last. The ends of the
// ranges below ascend with their argument, which may lie behind the block.
struct Visible {
  int64_t first;
  int64_t last;
  int64_t queries;
  int64_t keys;

  FLASHTILE_INLINE Range keys_of(int64_t query) const { return keys_of_group(query, 1); }
  FLASHTILE_INLINE Range queries_of(int64_t key) const { return queries_of_group(key, 1); }
  // The keys that some query of [query, query + count) sees.
  FLASHTILE_INLINE Range keys_of_group(int64_t query, int64_t count) const {
    return {clamp(query + first, keys), clamp(query + count - 1 + last, keys)};
  }
  // The queries that see some key of [key, key + count).
  FLASHTILE_INLINE Range queries_of_group(int64_t key, int64_t count) const {
    return {clamp(key - last + 1, queries), clamp(key + count - first, queries)};
  }
  // Whether every query sees every key.
  FLASHTILE_INLINE bool all() const { return queries - 1 + first <= 0 && last >= keys; }
  // The part of it that starts at (q0, k0).
  FLASHTILE_INLINE Visible block(int64_t q0, int64_t queries, int64_t k0, int64_t keys) const {
    return {first + q0 - k0, last + q0 - k0, queries, keys};
  }
};

// A whole sequence of a problem.
inline Visible visible_of(const Problem& problem, int64_t q_len, int64_t k_len) {
  constexpr int64_t kFar = int64_t{1} << 40;  // beyond every sequence, far from overflowing
  const Band& band = problem.band;
  const int64_t shift = band.top_left ? 0 : k_len - q_len;
  return {band.left < 0 ? -kFar : shift - smaller_of(band.left, kFar),
          band.right < 0 ? kFar : shift + smaller_of(band.right, kFar) + 1, q_len, k_len};
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
