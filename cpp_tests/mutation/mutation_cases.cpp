// The few cases that mutants run: chosen so that every mistake has one that it breaks, small enough
// to run dozens of times. fp16, whose small rounding errors hide less.
#include "../kernels/kernel_cases.h"

using namespace flashtile::test;

namespace {

std::vector<Case> cases() {
  return {
      {.name = "GQA", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150},
      {.name = "ragged", .seqlen_q = 257, .seqlen_k = 190},
      {.name = "rows without keys", .heads = 2, .heads_kv = 1, .seqlen_q = 150, .seqlen_k = 77},
      {.name = "values x 3", .seqlen_q = 200, .seqlen_k = 200, .values = Values::kTriple},
      {.name = "varlen",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {65, 0, 130},
       .lengths_k = {64, 5, 200}},
  };
}

}  // namespace

TEST("forward d64") { run_cases(cases(), Dtype::kFloat16, 64); }
TEST("forward d128") { run_cases(cases(), Dtype::kFloat16, 128); }
TEST("backward d64") { run_cases(cases(), Dtype::kFloat16, 64); }
TEST("backward d128") { run_cases(cases(), Dtype::kFloat16, 128); }
