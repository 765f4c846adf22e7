// The compiled CUDA kernels, forward and backward, against manual attention in fp64: every case of
// cases.h, both dtypes, both head dims, full and causal. One test is one process that runs dozens
// of cases, because loading the kernels takes longer than running one.
#include "../cases.h"
#include "kernel_cases.h"

using namespace flashtile::test;

TEST("shapes fp16 d64") { run_cases(shape_cases(), Dtype::kFloat16, 64); }
TEST("shapes fp16 d128") { run_cases(shape_cases(), Dtype::kFloat16, 128); }
TEST("shapes bf16 d64") { run_cases(shape_cases(), Dtype::kBFloat16, 64); }
TEST("shapes bf16 d128") { run_cases(shape_cases(), Dtype::kBFloat16, 128); }
TEST("options fp16 d64") { run_cases(option_cases(), Dtype::kFloat16, 64); }
TEST("options fp16 d128") { run_cases(option_cases(), Dtype::kFloat16, 128); }
TEST("options bf16 d64") { run_cases(option_cases(), Dtype::kBFloat16, 64); }
TEST("options bf16 d128") { run_cases(option_cases(), Dtype::kBFloat16, 128); }
TEST("varlen fp16 d64") { run_cases(varlen_cases(), Dtype::kFloat16, 64); }
TEST("varlen fp16 d128") { run_cases(varlen_cases(), Dtype::kFloat16, 128); }
TEST("varlen bf16 d64") { run_cases(varlen_cases(), Dtype::kBFloat16, 64); }
TEST("varlen bf16 d128") { run_cases(varlen_cases(), Dtype::kBFloat16, 128); }
