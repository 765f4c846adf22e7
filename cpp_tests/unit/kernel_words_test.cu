// Host-callable words of the kernels: mask block ranges by brute force, slots of varlen, the tuning
// table. Compiled by nvcc, run on the CPU.
#include <vector>

#include "../check.h"
#include "config.cuh"
#include "tile/mask.cuh"
#include "tile/work.cuh"

using namespace flashtile;

namespace {

template <class Mask>
void check_key_blocks(const Mask& mask, bool causal, int block_q, int block_k) {
  for (int q0 = 0; q0 < mask.seqlen_q; q0 += block_q) {
    const KvRange range = key_blocks(mask, q0, block_q, block_k);
    const int blocks = (mask.seqlen_k + block_k - 1) / block_k;
    for (int block = 0; block < blocks; ++block) {
      bool any = false, all = (block + 1) * block_k <= mask.seqlen_k;
      for (int q = q0; q < q0 + block_q; ++q) {
        for (int k = block * block_k; k < (block + 1) * block_k; ++k) {
          const bool seen =
              k < mask.seqlen_k && (!causal || k <= q + mask.seqlen_k - mask.seqlen_q);
          if (q < mask.seqlen_q && k < mask.seqlen_k) {
            any = any || seen;
            CHECK_EQ(visible(mask, q, k), seen);
          }
          if (q < mask.seqlen_q) all = all && seen;
        }
      }
      const bool visited = block >= range.begin && block < range.end;
      CHECK_EQ(visited, any);                            // exactly the blocks that somebody sees
      if (visited && !range.is_edge(block)) CHECK(all);  // untested blocks are seen whole
    }
    CHECK(range.end <= blocks);
  }
}

}  // namespace

TEST("mask block ranges by brute force") {
  for (const int seqlen_q : {1, 2, 7, 16, 33, 48}) {
    for (const int seqlen_k : {0, 1, 3, 8, 16, 31, 50}) {
      for (const int block_q : {4, 16}) {
        for (const int block_k : {4, 8}) {
          check_key_blocks(FullMask{seqlen_q, seqlen_k}, false, block_q, block_k);
          check_key_blocks(CausalMask{seqlen_q, seqlen_k}, true, block_q, block_k);
        }
      }
    }
  }
}

TEST("rows without keys are those that see none") {
  for (int q = 0; q < 9; ++q) {
    CHECK_EQ(sees_no_key(CausalMask{9, 4}, q), q < 5);
    CHECK_EQ(sees_no_key(FullMask{9, 4}, q), false);
    CHECK_EQ(sees_no_key(FullMask{9, 0}, q), true);
  }
}

TEST("varlen slots never collide and stay within the count") {
  const std::vector<std::vector<int>> problems = {
      {0, 0, 0}, {1}, {64, 64}, {63, 1, 0, 65, 128, 0, 7}, {1, 1, 1, 1, 1}, {200, 0, 0, 3}};
  for (const std::vector<int>& lengths : problems) {
    for (const int block : {32, 64, 128}) {
      int64_t row = 0, next_free = 0, total = 0;
      for (const int length : lengths) total += length;
      const int64_t slots = slot_count(true, static_cast<int64_t>(lengths.size()), 0, total, block);
      for (size_t b = 0; b < lengths.size(); ++b) {
        const int64_t first = first_slot(row, static_cast<int64_t>(b), block);
        CHECK(first >= next_free);
        next_free = first + (lengths[b] + block - 1) / block;
        CHECK(next_free <= slots);
        row += lengths[b];
      }
    }
  }
}

TEST("dense slots are the blocks of all sequences") {
  CHECK_EQ(slot_count(false, 3, 129, 0, 64), int64_t{9});
  CHECK_EQ(slot_count(false, 3, 128, 0, 64), int64_t{6});
  CHECK_EQ(slot_count(false, 3, 0, 0, 64), int64_t{0});
  CHECK_EQ(slot_count(false, 0, 100, 0, 64), int64_t{0});
  Problem problem;
  problem.batch = 2;
  problem.num_heads = 3;
  problem.seqlen_q = 130;
  CHECK_EQ(query_tile_count(problem, 128), int64_t{2 * 3 * 2});
}

TEST("rows of the tuning table are whole warps and fit their memory class") {
  for (const Memory memory : {Memory::kLarge, Memory::kSmall}) {
    for (const int dim : {64, 128}) {
      const ForwardConfig forward = forward_config(memory, dim);
      CHECK_EQ(forward.block_q % (16 * forward.warps), 0);
      CHECK_EQ(forward.block_k % 16, 0);
      const int forward_bytes = 2 * dim * (forward.block_q + 2 * forward.block_k);
      CHECK(forward_bytes <= shared_memory_limit(memory));
      const int per_sm = memory == Memory::kLarge ? 164 * 1024 : 100 * 1024;
      CHECK(forward.blocks_per_sm * (forward_bytes + 1024) <= per_sm);
      const BackwardConfig backward = backward_config(dim, memory);
      CHECK_EQ(backward.block_k % (16 * backward.warps_k), 0);
      CHECK_EQ(backward.block_q % (16 * backward.warps_q), 0);
      CHECK_EQ(backward.warps() % backward.dq_warps_q, 0);
    }
  }
}
