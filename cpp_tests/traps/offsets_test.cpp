// Offsets of billions of elements (spread.h), on the CPU and on a GPU. The PTX machine would have
// to fill such memory.
#include "spread.h"

using namespace flashtile::test;

TEST("L3 batches of keys 2^30 elements apart") {
  const Setup setup =
      make_setup({.name = "L3", .batch = 3, .seqlen_q = 2, .seqlen_k = 300, .dlse = false},
                 Dtype::kFloat16, 64, kCausal);
  check_spread(setup, {128, 64, 64}, {int64_t{1} << 30, 64, 64});
}

// Of all sequences side by side, the first and the last: the others belong to somebody else.
TEST("L6 keys of 24,000 rows, 700 sequences side by side: the last of them") {
  constexpr int64_t kRow = 700 * 128;
  const Setup setup =
      make_setup({.name = "L6", .batch = 2, .seqlen_q = 2, .seqlen_k = 24000, .dlse = false},
                 Dtype::kFloat16, 128, kCausal);
  check_spread(setup, {128, 256, 128}, {699 * 128, kRow, 128});
}

TEST("L7 heads just under and over 2^31 elements apart") {
  const Setup setup = make_setup(
      {.name = "L7", .heads = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70, .dlse = false},
      Dtype::kFloat16, 64, kCausal);
  for (const int64_t head : {(int64_t{1} << 31) - 8, (int64_t{1} << 31) + 8})
    check_spread(setup, {128, 64, head}, {128, 64, head});
}

// Originally 410,923 rows 9728 apart, on a GPU (gpu_sizes_test.cpp): the last of 16 heads of a
// tenth of the rows, at the same offsets.
TEST("S2 packed, 41,093 rows 97,280 elements apart: the last 15,000 behind 2^31") {
  const Setup setup = make_setup({.name = "S2",
                                  .lengths_q = {26000, 0, 15093},
                                  .lengths_k = {3, 5, 4},
                                  .masks = {kFull},
                                  .dlse = false},
                                 Dtype::kBFloat16, 96, kFull);
  check_spread(setup, {97280, 97280, 96}, {96, 96, 96});
}

// Originally 256 Ki rows of 6144 elements, on a GPU (gpu_sizes_test.cpp).
TEST("L5 16 Ki keys whose rows are 98,304 elements apart") {
  const Setup setup = make_setup({.name = "L5", .seqlen_q = 3, .seqlen_k = 16384, .dlse = false},
                                 Dtype::kFloat16, 128, kCausal);
  check_spread(setup, {384, 128, 128}, {0, 98304, 128});
}
