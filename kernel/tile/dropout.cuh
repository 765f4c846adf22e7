// Which elements dropout keeps: flashtile.h, flashtile_scores, has the generator and its layout.
// One call of Philox serves the eight elements that a lane holds of a 16 x 16 block.
#pragma once

#include "../params.h"
#include "accumulator.cuh"

namespace flashtile {

struct RandomWords {
  uint32_t of[4];
};

// Philox4x32-10 (Salmon et al., SC11).
FLASHTILE_DEVICE RandomWords philox(const RandomWords& counter, uint32_t key0, uint32_t key1) {
  RandomWords c = counter;
  FLASHTILE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c.of[0], b = uint64_t{0xcd9e8d57u} * c.of[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.of[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.of[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

// What the elements of one query head of a sequence share: two words of key, two of counter.
FLASHTILE_DEVICE RandomWords dropout_words(const Dropout& dropout, int64_t sequence, int head) {
  if (dropout.rng_state == nullptr) return {{0, 0, 0, 0}};  // everything is dropped
  const auto seed = static_cast<uint64_t>(dropout.rng_state[0]);
  const auto offset = static_cast<uint64_t>(dropout.rng_state[1]);
  return philox({{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                  static_cast<uint32_t>(head), static_cast<uint32_t>(sequence)}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The words of the 16 x 16 block whose first query and key these are, multiples of 16: of queries
// query0 + lane / 4 and 8 more, keys key0 + 2 (lane % 4) on.
FLASHTILE_DEVICE RandomWords block_words(const RandomWords& of_head, int query0, int key0,
                                         int query_lane, int key_lane) {
  return philox({{static_cast<uint32_t>(key0 / 4 + key_lane),
                  static_cast<uint32_t>(query0 / 2 + query_lane), of_head.of[2], of_head.of[3]}},
                of_head.of[0], of_head.of[1]);
}

// Whether an element is kept: query half and key half of the block, key % 2.
FLASHTILE_DEVICE bool is_kept(const RandomWords& words, int query_half, int key_half, int odd_key,
                              uint32_t threshold) {
  const uint32_t word = words.of[odd_key * 2 + key_half];
  return (query_half == 0 ? word & 0xffffu : word >> 16) >= threshold;
}

// Probabilities in columns 16 * k become 0 where they are dropped. `query`, `key`: of the warp's
// first row and column.
template <int kRows, int kKeys>
FLASHTILE_DEVICE void drop(Accumulator<kRows, kKeys>& p, int k, const RandomWords& of_head,
                           uint32_t threshold, int query, int key) {
  const int lane = ptx::thread_index() % 32;
  FLASHTILE_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    const RandomWords words =
        block_words(of_head, query + 16 * m, key + 16 * k, lane / 4, lane % 4);
    FLASHTILE_UNROLL
    for (int n = 0; n < 2; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (!is_kept(words, i / 2, n, i % 2, threshold)) p.d[m][2 * k + n][i] = 0.0f;
      }
    }
  }
}

}  // namespace flashtile
