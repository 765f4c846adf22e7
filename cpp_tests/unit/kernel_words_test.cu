// Host-callable words of the kernels: mask block ranges by brute force, slots of varlen, the tuning
// table. Compiled by nvcc, run on the CPU.
#include <vector>

#include "../support/check.h"
#include "backward/sm90_shape.cuh"
#include "config.cuh"
#include "decode/plan.cuh"
#include "tile/mask.cuh"
#include "tile/row_format.cuh"
#include "tile/work.cuh"

using namespace flashtile;

namespace {

// The definition, written out.
bool sees(const Band& band, int seqlen_q, int seqlen_k, int q, int k) {
  const int diagonal = band.top_left ? q : q + seqlen_k - seqlen_q;
  return (band.left < 0 || k >= diagonal - band.left) &&
         (band.right < 0 || k <= diagonal + band.right);
}

// Whether somebody in a rectangle sees something, and whether everybody sees everything.
struct Seen {
  bool any = false, all = true;
};

Seen rectangle(const Band& band, const BandMask& mask, int q0, int block_q, int k0, int block_k) {
  Seen seen;
  for (int q = q0; q < q0 + block_q && q < mask.seqlen_q; ++q) {
    for (int k = k0; k < k0 + block_k; ++k) {
      const bool one = k < mask.seqlen_k && sees(band, mask.seqlen_q, mask.seqlen_k, q, k);
      seen.any = seen.any || one;
      seen.all = seen.all && one;
      if (k < mask.seqlen_k) CHECK_EQ(mask.visible(q, k), one);
    }
  }
  return seen;
}

// Exactly the blocks in which somebody sees something are visited (`exact`; else at least these),
// and those that are not tested are seen whole.
void check_range(const BlockRange& range, int block, const Seen& seen, bool exact) {
  const bool visited = block >= range.begin && block < range.end;
  if (exact || seen.any) CHECK_EQ(visited, seen.any);
  if (visited && !range.is_edge(block)) CHECK(seen.all);
  if (visited && seen.all && exact) CHECK(!range.is_edge(block));
}

void check_band(const Band& band, int seqlen_q, int seqlen_k, int block_q, int block_k) {
  const BandMask mask(band, seqlen_q, seqlen_k);
  for (int q0 = 0; q0 < seqlen_q; q0 += block_q) {
    const BlockRange range = mask.key_blocks(q0, block_q, block_k);
    for (int k0 = 0; k0 < seqlen_k; k0 += block_k) {
      check_range(range, k0 / block_k, rectangle(band, mask, q0, block_q, k0, block_k), true);
    }
    CHECK(range.end <= ceil_div(seqlen_k, block_k));
  }
  for (int k0 = 0; k0 < seqlen_k; k0 += block_k) {
    const BlockRange range = mask.query_blocks(k0, block_k, block_q);
    for (int q0 = 0; q0 < seqlen_q; q0 += block_q) {
      check_range(range, q0 / block_q, rectangle(band, mask, q0, block_q, k0, block_k), false);
    }
    CHECK(range.end <= ceil_div(seqlen_q, block_q));
    CHECK(range.begin <= range.full_begin && range.full_begin <= range.full_end);
  }
}

std::vector<Band> bands() {
  std::vector<Band> all;
  for (const bool top_left : {false, true}) {
    for (const int left : {-1, 0, 1, 5, 17, 100}) {
      for (const int right : {-1, 0, 1, 6, 23, 100}) all.push_back({left, right, top_left});
    }
  }
  return all;
}

}  // namespace

TEST("mask block ranges by brute force") {
  for (const Band& band : bands()) {
    for (const int seqlen_q : {1, 2, 7, 16, 33, 48}) {
      for (const int seqlen_k : {0, 1, 3, 8, 16, 31, 50}) {
        for (const int block_q : {4, 16}) {
          for (const int block_k : {4, 8}) check_band(band, seqlen_q, seqlen_k, block_q, block_k);
        }
      }
    }
  }
}

TEST("bounds beyond every length are no bounds") {
  for (const int64_t far : {int64_t{1} << 31, int64_t{1} << 62, INT64_MAX}) {
    const BandMask mask({far, far, false}, kLongestSequence, 50);
    for (const int q : {0, 1, kLongestSequence - 1}) {
      CHECK_EQ(mask.key_begin(q), 0);
      CHECK_EQ(mask.key_end(q), 50);
    }
  }
}

TEST("rows without keys are those that see none") {
  for (int q = 0; q < 9; ++q) {
    CHECK_EQ(BandMask({-1, 0, false}, 9, 4).sees_no_key(q), q < 5);
    CHECK_EQ(BandMask({-1, -1, false}, 9, 4).sees_no_key(q), false);
    CHECK_EQ(BandMask({-1, -1, false}, 9, 0).sees_no_key(q), true);
    CHECK_EQ(BandMask({2, 0, true}, 9, 4).sees_no_key(q), q >= 6);
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

TEST("row formats: whole units of 16, 4 or 2 bytes, at every row's start") {
  Problem problem;
  problem.batch = problem.num_heads = 2;
  problem.seqlen_q = 5;
  const auto at = [](int64_t address) { return reinterpret_cast<void*>(address); };
  const auto format = [&](const View& view, int head_dim) {
    return query_format(view, problem, head_dim);
  };
  const View dense{at(1024), 640, 128, 64};
  CHECK_EQ(format(dense, 64).unit, 16);
  CHECK_EQ(format(dense, 40).unit, 16);
  CHECK_EQ(format(dense, 46).unit, 4);
  CHECK_EQ(format(dense, 37).unit, 2);
  CHECK(fills_tile(format(dense, 64), 64) && !fills_tile(format(dense, 40), 64));
  for (const View& view : {View{at(1028), 640, 128, 64}, View{at(1024), 642, 128, 64},
                           View{at(1024), 640, 130, 64}, View{at(1024), 640, 128, 66}}) {
    CHECK_EQ(format(view, 64).unit, 4);
  }
  for (const View& view : {View{at(1026), 640, 128, 64}, View{at(1024), 641, 128, 64},
                           View{at(1024), 640, 129, 64}, View{at(1024), 640, 128, 65}}) {
    CHECK_EQ(format(view, 64).unit, 2);
  }
  problem.batch = problem.num_heads = problem.seqlen_q = 1;  // strides that nothing is reached by
  CHECK_EQ(format({at(1024), 1, 1, 1}, 64).unit, 16);
}

namespace {

void check_rows(Memory memory, int dim, const ForwardConfig& forward,
                const BackwardConfig& backward) {
  CHECK_EQ(forward.block_q % (16 * forward.warps), 0);
  CHECK_EQ(forward.block_k % 16, 0);
  const int forward_bytes = 2 * dim * (forward.block_q + 2 * forward.block_k);
  CHECK(forward_bytes <= shared_memory_limit(memory));
  const int per_sm = memory == Memory::kLarge ? 164 * 1024 : 100 * 1024;
  CHECK(forward.blocks_per_sm * (forward_bytes + 1024) <= per_sm);
  CHECK_EQ(backward.block_k % (16 * backward.warps_k), 0);
  CHECK_EQ(backward.block_q % (16 * backward.warps_q), 0);
  CHECK_EQ(backward.warps() % backward.dq_warps_q, 0);
}

template <Memory kMemory, Variant kVariant, int... kDims>
void check_tables() {
  (check_rows(kMemory, kDims, forward_config(kMemory, kDims, kVariant),
              backward_config(kDims, kMemory, kVariant)),
   ...);
}

}  // namespace

TEST("rows of the tuning table are whole warps and fit their memory class") {
  check_tables<Memory::kLarge, Variant::kPlain, 32, 64, 96, 128, 192, 256>();
  check_tables<Memory::kSmall, Variant::kPlain, 32, 64, 96, 128, 192, 256>();
  check_tables<Memory::kLarge, Variant::kModified, 64, 128, 256>();
  check_tables<Memory::kSmall, Variant::kModified, 64, 128, 256>();
}

namespace {

template <int kHeadDim, Variant kVariant = Variant::kPlain>
void check_dq_order() {
  using Order = DqOrderSm90<kHeadDim, kVariant>;
  using Slot = typename BackwardShapeSm90<kHeadDim, kVariant>::Slot;
  std::vector<int> used(static_cast<size_t>(Slot::kDq));
  for (int row = 0; row < Order::kBlockQ; ++row) {
    for (int col = 0; col < kHeadDim; ++col) {
      const int place = Order::offset(row, col / 8 * 8) + col % 8 / 2 * 4 + col % 2;
      CHECK(place >= 0 && place < Slot::kDq);
      if (place >= 0 && place < Slot::kDq) ++used[static_cast<size_t>(place)];
    }
  }
  for (const int count : used) CHECK_EQ(count, 1);
}

}  // namespace

TEST("dq of the backward for sm_90a: every element has a place of its own") {
  check_dq_order<64>();
  check_dq_order<128>();
  check_dq_order<192>();
  check_dq_order<256>();
  check_dq_order<64, Variant::kModified>();
  check_dq_order<128, Variant::kModified>();
  check_dq_order<256, Variant::kModified>();
}

TEST("division by the size of a page is exact") {
  for (uint32_t divisor = 1; divisor < 3000; ++divisor) {
    const Divisor by(divisor);
    for (uint32_t n : {0u, 1u, divisor - 1, divisor, divisor + 1, 5 * divisor - 1, 5 * divisor,
                       0x7fffffffu / divisor * divisor, 0x7fffffffu / divisor * divisor - 1,
                       0x7ffffffeu, 0x7fffffffu})
      CHECK_EQ(by.quotient(static_cast<int>(n)), static_cast<int>(n / divisor));
  }
  for (int shift = 2; shift < 31; ++shift) {
    for (const uint32_t divisor :
         {(1u << shift) - 1, 1u << shift, (1u << shift) + 1, 0x7fffffffu}) {
      const Divisor by(divisor);
      for (uint32_t multiple = 0; multiple <= 0x7fffffffu / divisor && multiple < 2000;
           ++multiple) {
        for (const uint32_t rest : {0u, divisor / 2, divisor - 1}) {
          const uint64_t n = uint64_t{multiple} * divisor + rest;
          if (n <= 0x7fffffffu)
            CHECK_EQ(by.quotient(static_cast<int>(n)), static_cast<int>(multiple));
        }
      }
    }
  }
}

TEST("the parts of a tile's steps: each once, none empty, as many as there is room for") {
  for (const int64_t num_splits : {0, 1, 2, 3, 7, 16, 31, 32, 33, 1000}) {
    for (int steps = 0; steps < 1100; ++steps) {
      const int begin = steps % 5;
      const DecodeParts parts(begin, begin + steps, num_splits);
      int next = begin;
      for (int part = 0; part < parts.count; ++part) {
        CHECK_EQ(parts.first(part), next);
        next = parts.last(part);
        CHECK(next > parts.first(part));
      }
      CHECK_EQ(next, begin + steps);
      CHECK(num_splits == 0 || parts.count <= num_splits);
      Problem problem{};
      problem.batch = problem.num_heads = problem.num_heads_kv = problem.seqlen_q = 1;
      problem.cache.page_size = int64_t{begin + steps} * kDecodeStep;
      problem.cache.num_pages = 1;
      problem.cache.num_splits = num_splits;
      CHECK(parts.count <= decode_plan(problem).most_parts);
    }
  }
}
