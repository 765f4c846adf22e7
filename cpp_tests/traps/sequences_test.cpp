// Empty sequences (E), packed ones (V) and memory that is not the sequence's (P). Every buffer here
// is NaN wherever no row in use lies: setup.h.
#include <algorithm>
#include <cstring>

#include "target.h"

using namespace flashtile::test;

TEST("E1 batch 0 with 3952 queries, 10 heads, 16 keys") {
  check_case(
      {.name = "E1", .batch = 0, .heads = 10, .heads_kv = 10, .seqlen_q = 3952, .seqlen_k = 16},
      64);
}

TEST("E2 no queries, no keys, neither: dense and packed, forward and backward") {
  for (const auto& [queries, keys] : {std::pair(0, 4096), std::pair(40, 0), std::pair(0, 0)}) {
    check_case({.name = "E2", .heads = 2, .heads_kv = 1, .seqlen_q = queries, .seqlen_k = keys},
               64);
    check_case({.name = "E2",
                .heads = 2,
                .heads_kv = 1,
                .lengths_q = {0, queries},
                .lengths_k = {0, keys}},
               64);
  }
  check_case({.name = "E2, cu_seqlens all zero", .lengths_q = {0, 0, 0}, .lengths_k = {0, 0, 0}},
             64);
}

TEST("E3 no keys in the backward") {
  for (const HeadDims& head_dims : {HeadDims(64), HeadDims(256), HeadDims(33, 200)}) {
    check_case({.name = "E3", .heads = 2, .heads_kv = 2, .seqlen_q = 130, .seqlen_k = 0},
               head_dims);
    check_case({.name = "E3", .batch = 2, .seqlen_q = 70, .seqlen_k = 50, .used_k = {0, 0}},
               head_dims);
  }
}

TEST("E4 5 queries, 2 keys, causal: rows 0 to 2 are 0 and -inf") {
  const Case spec = {.name = "E4", .heads = 2, .heads_kv = 2, .seqlen_q = 5, .seqlen_k = 2};
  check_case(spec, 64);
  for (const RunResult& result : results_of(make_setup(spec, Dtype::kFloat16, 64, kCausal))) {
    for (size_t i = 0; i < result.values.lse.size(); ++i)
      CHECK_EQ(std::isinf(result.values.lse[i]), i / 2 < 3);
    for (size_t i = 0; i < result.values.out.size(); ++i) {
      if (i / 128 < 3) CHECK_EQ(result.values.out[i], 0.0);
      if (i / 128 < 3) CHECK_EQ(result.values.dq[i], 0.0);
    }
  }
}

// A boolean mask whose rows are all false is, as a band, rows that no key falls into.
TEST("E5 rows without a key among rows with keys") {
  check_case({.name = "E5",
              .heads = 2,
              .heads_kv = 1,
              .seqlen_q = 140,
              .seqlen_k = 50,
              .masks = {kCausal, {10, 0}, {0, 10, true}, {40, 40, true}}},
             64);
}

TEST("E6 129 queries, window (32, 64): rows without keys") {
  check_case({.name = "E6", .seqlen_q = 129, .seqlen_k = 16, .masks = {{32, 64}, {32, 64, true}}},
             64);
}

TEST("E7 without keys the LSE is minus infinity") {
  const Setup setup =
      make_setup({.name = "E7", .seqlen_q = 30, .seqlen_k = 0}, Dtype::kFloat16, 64, kFull);
  for (const RunResult& result : results_of(setup)) {
    CHECK_EQ(result.values.lse.size(), size_t{30});
    for (const double lse : result.values.lse) CHECK(lse == -kInfinity);
  }
}

TEST("V1 lengths 1, 0, 1 over 3, 0, 5 keys, heads 9/3, causal") {
  check_case({.name = "V1",
              .heads = 9,
              .heads_kv = 3,
              .lengths_q = {1, 0, 1},
              .lengths_k = {3, 0, 5},
              .masks = {kCausal}},
             64);
}

TEST("V2 cu_seqlens 0, 0, 0, 0, 1: more sequences than rows, heads 21/7, head dim 120") {
  check_case({.name = "V2",
              .heads = 21,
              .heads_kv = 7,
              .lengths_q = {0, 0, 0, 1},
              .lengths_k = {0, 0, 0, 1}},
             120);
}

// Originally ten times as long.
TEST("V3 queries 0, 120, 84, 0 over keys 253, 174, 84, 307, heads 4/1, head dim 256") {
  check_case({.name = "V3",
              .heads = 4,
              .heads_kv = 1,
              .lengths_q = {0, 120, 84, 0},
              .lengths_k = {253, 174, 84, 307}},
             256, {Dtype::kBFloat16});
}

// Originally with 32 heads and 1023 over 2044 rows.
TEST("V4 lengths 0, 511 over 1, 1022 keys, head dim 128: the backward ends") {
  check_case({.name = "V4", .lengths_q = {0, 511}, .lengths_k = {1, 1022}}, 128,
             {Dtype::kBFloat16});
}

TEST("V5 lengths 150, 0, 150 over 100, 100, 100 keys") {
  check_case({.name = "V5",
              .heads = 2,
              .heads_kv = 2,
              .lengths_q = {150, 0, 150},
              .lengths_k = {100, 100, 100}},
             64);
}

TEST("V6 rows beyond the last sequence are 0 in out, dq, dk, dv") {
  const Case spec = {.name = "V6",
                     .heads = 2,
                     .heads_kv = 1,
                     .lengths_q = {30, 0, 40},
                     .lengths_k = {20, 10, 70},
                     .tail_q = 150,
                     .tail_k = 90};
  check_case(spec, 64);
  for (const RunResult& result : results_of(make_setup(spec, Dtype::kBFloat16, 64, kCausal))) {
    const AttentionOutput& values = result.values;
    const auto zero_from = [](const std::vector<double>& tensor, size_t first) {
      return std::all_of(tensor.begin() + static_cast<std::ptrdiff_t>(first), tensor.end(),
                         [](double x) { return x == 0.0; });
    };
    CHECK(zero_from(values.out, size_t{70 * 2 * 64}));
    CHECK(zero_from(values.dq, size_t{70 * 2 * 64}));
    CHECK(zero_from(values.dk, size_t{100 * 64}));
    CHECK(zero_from(values.dv, size_t{100 * 64}));
  }
}

TEST("V7 cu_seqlens 0, 3, 7, 9 with 2, 3, 1 rows in use, backward") {
  check_case({.name = "V7",
              .heads = 2,
              .heads_kv = 2,
              .lengths_q = {3, 4, 2},
              .lengths_k = {3, 4, 2},
              .used_q = {2, 3, 1},
              .used_k = {2, 3, 1}},
             64);
}

// With odd strides the runner gives useless hints: 0 queries, 1 key.
TEST("V8 the longest length is a hint: too small and too large") {
  Case spec = {
      .name = "V8", .heads = 2, .heads_kv = 1, .lengths_q = {70, 5}, .lengths_k = {9, 130}};
  check_case(spec, 64);
  spec.layout = Layout::kOdd;
  check_case(spec, 64);
}

// The runner copies cu_seqlens into an allocation of exactly their bytes; the machine watches its
// end.
TEST("V9 cu_seqlens at the end of an allocation") {
  for (const int batch : {1, 2, 3, 4, 5, 7, 8, 9, 31}) {
    const std::vector<int> lengths(static_cast<size_t>(batch), 3);
    check_case({.name = "V9", .lengths_q = lengths, .lengths_k = lengths, .used_q = lengths}, 32,
               {Dtype::kFloat16});
  }
}

// Originally 80,000: sizes_test.cpp.
TEST("V10 600 sequences of 16 rows") {
  const std::vector<int> lengths(600, 16);
  check_case({.name = "V10", .lengths_q = lengths, .lengths_k = lengths, .masks = {kCausal}}, 16,
             {Dtype::kFloat16});
}

// Originally with softcap 15, which this version does not have.
TEST("V11 128 queries, 217 keys, head dim 128, causal, packed, backward") {
  check_case({.name = "V11", .lengths_q = {128}, .lengths_k = {217}, .masks = {kCausal}}, 128);
}

TEST("P1 a cache of 128 rows with 32, 64, 96, 48 in use and NaN behind them") {
  for (const int queries : {1, 40}) {
    check_case({.name = "P1",
                .batch = 4,
                .heads = 4,
                .heads_kv = 2,
                .seqlen_q = queries,
                .seqlen_k = 128,
                .used_k = {32, 64, 96, 48}},
               64);
  }
  check_case(
      {.name = "P1", .batch = 2, .seqlen_q = 3, .seqlen_k = 3, .used_q = {1, 3}, .used_k = {1, 3}},
      64);
}

TEST("P2 NaN behind the rows of the LSE and its gradient") {
  check_case({.name = "P2", .batch = 2, .heads = 3, .heads_kv = 3, .seqlen_q = 33, .seqlen_k = 65},
             64);
}

// Originally with pages and splits, which this version does not have.
TEST("P3 out, dq, dk, dv filled with NaN beforehand") {
  check_case({.name = "P3",
              .batch = 2,
              .heads = 4,
              .heads_kv = 4,
              .seqlen_q = 1,
              .seqlen_k = 256,
              .used_k = {200, 256}},
             64);
}
