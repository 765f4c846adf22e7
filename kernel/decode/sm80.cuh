// Decoding over a key/value cache for compute capability 8.0 and later: few queries, many keys. One
// thread block computes one part of the keys for all packed rows of a sequence and key/value head
// (decode/plan.cuh), so that every key and value is read once. Up to 16 rows its warps share the
// keys (decode/few.cuh), from 17 on the rows (decode/many.cuh).
#pragma once

#include "config.cuh"
#include "decode/few.cuh"
#include "decode/many.cuh"
#include "launch.cuh"
#include "params.h"

namespace flashtile {

template <int kHeadDim, Memory kMemory, class T, class Policy = PlainScores>
struct DecodeSm80 {
  using ScorePolicy = Policy;
  using Params = typename Policy::template WithScores<DecodeParams>;
  static constexpr DecodeConfig kConfig = decode_config(kMemory, kHeadDim);
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kBlocksPerSm = kConfig.blocks_per_sm;

  using Few = DecodeFew<kHeadDim, T, kConfig.slots, Policy>;
  using Many = DecodeMany<kHeadDim, T, kConfig.half_slots(), Policy>;
  static constexpr int kSharedBytes = max_of(Few::kSharedBytes, Many::kSharedBytes);
  static_assert(kBlocksPerSm * (kSharedBytes + 1024) <= shared_memory_limit(kMemory) + 1024);

  // The sequence alone decides which form computes it, so a row's bits do not depend on others.
  FLASHTILE_DEVICE static void run(const Params& params, char* shared) {
    const DecodeWork work(params, ptx::block_index());
    if (work.empty()) return;
    if (work.rows <= kDecodeTile) {
      Few::run(params, work, ptx::shared_address(shared));
    } else {
      Many::run(params, work, ptx::shared_address(shared));
    }
  }
};

}  // namespace flashtile
