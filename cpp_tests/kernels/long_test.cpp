// More and longer cases of kernels_test.cpp, for make test-long.
#include "../support/cases.h"
#include "../support/check.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

// Small cases with each of these head dims.
void run_head_dims(const std::vector<HeadDims>& all, Dtype dtype) {
  for (const HeadDims& head_dims : all) run_cases(head_dim_cases(), dtype, head_dims);
}

}  // namespace

TEST("long fp16 d64") { run_cases(long_cases(), Dtype::kFloat16, 64); }
TEST("long fp16 d128") { run_cases(long_cases(), Dtype::kFloat16, 128); }
TEST("long bf16 d64") { run_cases(long_cases(), Dtype::kBFloat16, 64); }
TEST("long bf16 d128") { run_cases(long_cases(), Dtype::kBFloat16, 128); }
TEST("long fp16 d192") { run_cases(long_cases(), Dtype::kFloat16, 192); }
TEST("long bf16 d256") { run_cases(long_cases(), Dtype::kBFloat16, 256); }
TEST("head dims fp16") { run_head_dims(equal_head_dims(), Dtype::kFloat16); }
TEST("head dims bf16") { run_head_dims(unequal_head_dims(), Dtype::kBFloat16); }
