// The table of cases that every runner uses: the kernels on the machine and on a GPU, the CPU op,
// the libtorch test. Here shapes, options and varlen; the groups of contract_cases.h belong to it.
#pragma once

#include <initializer_list>
#include <vector>

#include "case.h"
#include "contract_cases.h"

namespace flashtile::test {

inline std::vector<Case> joined(std::initializer_list<std::vector<Case>> groups) {
  std::vector<Case> all;
  for (const std::vector<Case>& group : groups) all.insert(all.end(), group.begin(), group.end());
  return all;
}

// Lengths around the block edges 16, 32, 64, 128, and queries longer and shorter than keys.
inline std::vector<Case> shape_cases() {
  return {
      {.name = "one row, one key", .seqlen_q = 1, .seqlen_k = 1},
      {.name = "one row, 97 keys", .heads = 2, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 97},
      {.name = "200 rows, one key", .seqlen_q = 200, .seqlen_k = 1},
      {.name = "5 rows, 2 keys: rows without a key",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 5,
       .seqlen_k = 2},
      {.name = "16 x 16", .seqlen_q = 16, .seqlen_k = 16},
      {.name = "17 x 33", .seqlen_q = 17, .seqlen_k = 33},
      {.name = "31 x 63", .seqlen_q = 31, .seqlen_k = 63},
      {.name = "64 x 64", .batch = 2, .seqlen_q = 64, .seqlen_k = 64},
      {.name = "65 x 127", .seqlen_q = 65, .seqlen_k = 127},
      {.name = "63 x 65", .seqlen_q = 63, .seqlen_k = 65},
      {.name = "128 x 128", .seqlen_q = 128, .seqlen_k = 128},
      {.name = "129 x 129", .seqlen_q = 129, .seqlen_k = 129},
      {.name = "77 x 200", .batch = 2, .seqlen_q = 77, .seqlen_k = 200},
      {.name = "200 x 77: rows without a key", .seqlen_q = 200, .seqlen_k = 77},
      {.name = "257 x 190", .seqlen_q = 257, .seqlen_k = 190},
      {.name = "no keys", .heads = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 0},
      {.name = "no queries", .heads = 2, .heads_kv = 2, .seqlen_q = 0, .seqlen_k = 40},
      {.name = "empty batch",
       .batch = 0,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 16},
  };
}

// Heads that share keys; layouts; values that break careless softmax; determinism.
inline std::vector<Case> option_cases() {
  return {
      {.name = "GQA 4/2", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 70},
      {.name = "MQA 6/1", .heads = 6, .heads_kv = 1, .seqlen_q = 33, .seqlen_k = 90},
      {.name = "without dLSE",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 50,
       .seqlen_k = 80,
       .dlse = false},
      {.name = "head-major",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 70,
       .layout = Layout::kHeadMajor},
      {.name = "padded",
       .batch = 2,
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 70,
       .seqlen_k = 90,
       .layout = Layout::kPadded},
      {.name = "odd strides",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 35,
       .seqlen_k = 67,
       .layout = Layout::kOdd},
      {.name = "seq-major",
       .batch = 3,
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 33,
       .seqlen_k = 40,
       .layout = Layout::kSeqMajor},
      {.name = "mixed layouts",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 66,
       .layout = Layout::kMixed},
      {.name = "broadcast k, v, dout",
       .batch = 2,
       .heads = 3,
       .heads_kv = 1,
       .seqlen_q = 40,
       .seqlen_k = 50,
       .layout = Layout::kBroadcast},
      {.name = "values x 3", .seqlen_q = 90, .seqlen_k = 140, .values = Values::kTriple},
      {.name = "every logit near -120",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 64,
       .seqlen_k = 192,
       .values = Values::kVeryNegative},
      {.name = "every logit near -120, one row",
       .seqlen_q = 1,
       .seqlen_k = 97,
       .values = Values::kVeryNegative},
      {.name = "one key takes all", .seqlen_q = 80, .seqlen_k = 150, .values = Values::kPeaked},
      {.name = "logits of 5e8",
       .seqlen_q = 33,
       .seqlen_k = 70,
       .values = Values::kHuge,
       .dlse = false},
      {.name = "scale 0", .seqlen_q = 40, .seqlen_k = 70, .values = Values::kZeroScale},
      {.name = "negative scale", .seqlen_q = 40, .seqlen_k = 70, .values = Values::kNegativeScale},
      {.name = "NaN and infinity",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 70,
       .seqlen_k = 90,
       .masks = {kFull},
       .values = Values::kNan},
      {.name = "deterministic",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 90,
       .seqlen_k = 140,
       .deterministic = true},
  };
}

inline std::vector<Case> varlen_cases() {
  return {
      {.name = "varlen: 1, 0, 1",
       .heads = 9,
       .heads_kv = 3,
       .lengths_q = {1, 0, 1},
       .lengths_k = {3, 0, 5}},
      {.name = "varlen: more sequences than rows",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {0, 0, 0, 1},
       .lengths_k = {0, 0, 0, 1}},
      {.name = "varlen: no rows",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {0, 0},
       .lengths_k = {0, 0}},
      {.name = "varlen: no queries",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {0, 0},
       .lengths_k = {30, 7}},
      {.name = "varlen: no keys",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {30, 7},
       .lengths_k = {0, 0}},
      {.name = "varlen: empty in the middle",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {75, 0, 75},
       .lengths_k = {50, 50, 50}},
      {.name = "varlen: keys for nobody, queries for nothing",
       .lengths_q = {40, 0, 70, 20},
       .lengths_k = {0, 66, 70, 130}},
      {.name = "varlen: block edges",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {1, 64, 17, 0, 129},
       .lengths_k = {64, 1, 33, 5, 100}},
      {.name = "varlen: padded",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {33, 50},
       .lengths_k = {70, 20},
       .layout = Layout::kPadded},
      {.name = "varlen: odd strides",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {33, 20},
       .lengths_k = {40, 70},
       .layout = Layout::kOdd},
      {.name = "varlen: deterministic",
       .lengths_q = {70, 90},
       .lengths_k = {100, 90},
       .deterministic = true},
  };
}

// Longer runs of the same kinds, for make test-long.
inline std::vector<Case> long_cases() {
  std::vector<Case> cases = {
      {.name = "320 x 320", .heads = 2, .heads_kv = 2, .seqlen_q = 320, .seqlen_k = 320},
      {.name = "190 x 500", .seqlen_q = 190, .seqlen_k = 500},
      {.name = "500 x 190", .seqlen_q = 500, .seqlen_k = 190},
      {.name = "GQA 14/2", .heads = 14, .heads_kv = 2, .seqlen_q = 88, .seqlen_k = 448},
      {.name = "varlen: 150 x 100",
       .heads = 4,
       .heads_kv = 2,
       .lengths_q = {150, 0, 150},
       .lengths_k = {100, 100, 100}},
      {.name = "varlen: 1023 rows and nothing", .lengths_q = {0, 0, 300}, .lengths_k = {0, 1, 400}},
      {.name = "every logit near -120, 704",
       .seqlen_q = 100,
       .seqlen_k = 704,
       .values = Values::kVeryNegative},
      {.name = "values x 3, 400", .seqlen_q = 257, .seqlen_k = 400, .values = Values::kTriple},
      {.name = "deterministic GQA",
       .batch = 2,
       .heads = 4,
       .heads_kv = 2,
       .seqlen_q = 200,
       .seqlen_k = 200,
       .deterministic = true},
  };
  for (const int length : {15, 47, 48, 49, 95, 96, 97, 111, 112, 113, 191, 192, 193, 255, 256}) {
    cases.push_back({.name = "q swept", .seqlen_q = length, .seqlen_k = 130});
    cases.push_back({.name = "k swept", .seqlen_q = 130, .seqlen_k = length});
  }
  return cases;
}

}  // namespace flashtile::test
