// Decoding for dense tensors: k and v of (batch, seqlen_k) are a key/value cache of one page for
// each sequence. Host code.
#pragma once

#include <algorithm>

#include "decode/plan.cuh"

namespace flashtile {

// The forward's loop gives all keys of a query head to one thread block; decoding shares them out
// and reads those of a group of heads once, but takes a second launch and leaves partial results.
// Up to here the loop has 8 blocks of 64 keys, which take about as long as that launch.
inline constexpr int64_t kDenseDecodeKeys = 512;
// For every packed row. Then the partial results of a row's 16 parts, in fp32, are at most about a
// quarter of its keys and values: as traffic, and as workspace.
inline constexpr int64_t kDenseDecodeKeysOfRow = 64;

// Thread blocks of the larger of the two launches.
inline int64_t decode_blocks(const Problem& p) {
  return std::max(decode_plan(p).blocks(p), combine_blocks(p));
}

inline Problem with_keys_in_cache(Problem problem) {
  problem.cache.page_size = problem.seqlen_k;
  problem.cache.num_pages = problem.batch;
  return problem;
}

// Whether decoding serves a dense problem. The shape of a sequence decides, not how many there are:
// a row's bits do not depend on the batch.
inline bool is_dense_decode(const Problem& p) {
  if (p.is_varlen() || p.cache.exists()) return false;
  const int64_t rows = p.seqlen_q * p.group();
  if (rows < 1 || rows > kDecodeLimit) return false;
  const BandMask mask(p.band, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k));
  const int seen = mask.key_end(mask.seqlen_q - 1) - mask.key_begin(0);
  return seen >= std::max(kDenseDecodeKeys, rows * kDenseDecodeKeysOfRow) &&
         decode_blocks(with_keys_in_cache(p)) <= INT32_MAX;
}

}  // namespace flashtile
