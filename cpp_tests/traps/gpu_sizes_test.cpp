// Traps at a full size for which only a GPU has the time.
#include "copies.h"
#include "spread.h"

using namespace flashtile::test;

TEST("L1 65,535 and 65,536 batches of 4 rows, 8 heads of 64") {
  for (const int64_t copies : {65535, 65536}) check_copies(one_batch(8, 4, 4, 64), copies);
}

TEST("L1 65,536 heads of 10 rows of 16; 71,280 heads of 3 rows of 128") {
  check_copies(one_batch(65536, 10, 10, 16), 1);
  check_copies(one_batch(71280, 3, 3, 128), 1);
}

TEST("L4 32 batches of 350,000 keys, 12 heads of 64") {
  check_copies(one_batch(12, 5, 350000, 64), 32);
}

TEST("D2 300 batches of 2048 queries, 128 keys, head dim 128, fp16 x 3, 50 times") {
  const Setup setup = one_batch(1, 2048, 128, 128, Values::kTriple);
  for (int i = 0; i < 50; ++i) check_copies(setup, 300);
}

// One head of 48: those beside it belong to somebody else.
TEST("L5 256 Ki keys of 6144 elements") {
  const Setup setup = make_setup({.name = "L5", .seqlen_q = 3, .seqlen_k = 262144, .dlse = false},
                                 Dtype::kFloat16, 128, kCausal);
  check_spread(setup, {384, 128, 128}, {0, 6144, 128});
}

TEST("S2 packed, 410,923 rows 9728 elements apart") {
  const Setup setup = make_setup({.name = "S2",
                                  .lengths_q = {260000, 0, 150923},
                                  .lengths_k = {3, 5, 4},
                                  .masks = {kFull},
                                  .dlse = false},
                                 Dtype::kBFloat16, 96, kFull);
  check_spread(setup, {9728, 9728, 96}, {96, 96, 96});
}
