// Rows of a key/value cache: from a key of a sequence to its page, and from there to an address.
#pragma once

#include "../cache.h"
#include "../params.h"
#include "work.cuh"

namespace flashtile {

// Division of 0 <= n < 2^31 by a number that the host knows: multiplier = 2^shift / divisor,
// rounded up, with shift = 31 + ceil(log2(divisor)).
struct Divisor {
  uint32_t divisor = 1, multiplier = 0;
  int32_t shift = 0;

  FLASHTILE_HOST_DEVICE explicit Divisor(uint32_t value) : divisor(value) {
    shift = 31;
    while (uint64_t{1} << (shift - 31) < value) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / value + 1);
  }
  FLASHTILE_HOST_DEVICE int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
};

// Sequence `index` of a problem whose keys are in a cache; row_k counts rows of the sequence.
FLASHTILE_DEVICE Sequence cache_sequence_of(const Problem& p, int64_t index) {
  const SequenceSide q = query_side(p, index);
  const CacheRows k = cache_rows(p, index);
  return sequence_from(p, index, q, {k.begin, static_cast<int>(k.count), 0});
}

// Where a key is; row < 0: it does not exist.
struct CachePlace {
  int page, row;
};

// Of row `row` of a sequence, which it has.
FLASHTILE_DEVICE CachePlace cache_place(const Cache& cache, const Divisor& page_size,
                                        int64_t sequence, int row) {
  const int block = page_size.quotient(row);
  return {static_cast<int>(readable_page(cache, sequence, block)),
          row - block * static_cast<int>(page_size.divisor)};
}

// The first row of page 0, of one head.
FLASHTILE_DEVICE const char* cache_head(const View& view, int head) {
  return static_cast<const char*>(view.data) + 2 * (head * view.stride_head);
}

// Bytes from the first row of page 0 to a place that exists.
FLASHTILE_DEVICE int64_t place_bytes(const View& view, const CachePlace& place) {
  return 2 * (place.page * view.stride_batch + place.row * view.stride_seq);
}

}  // namespace flashtile
