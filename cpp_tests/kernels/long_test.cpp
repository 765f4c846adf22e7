// More and longer cases of kernels_test.cpp, for make test-long.
#include "../cases.h"
#include "kernel_cases.h"

using namespace flashtile::test;

TEST("long fp16 d64") { run_cases(long_cases(), Dtype::kFloat16, 64); }
TEST("long fp16 d128") { run_cases(long_cases(), Dtype::kFloat16, 128); }
TEST("long bf16 d64") { run_cases(long_cases(), Dtype::kBFloat16, 64); }
TEST("long bf16 d128") { run_cases(long_cases(), Dtype::kBFloat16, 128); }
