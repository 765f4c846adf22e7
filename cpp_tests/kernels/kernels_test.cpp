// The compiled CUDA kernels, forward and backward, against manual attention in fp64: the case table
// of cases.h, on every slice and device model under three schedules each. matrix_test.cpp combines
// the features; here are the shapes at block edges, values and rows in use. One test is one process
// that runs dozens of cases, because loading the kernels takes longer than running one.
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
TEST("windows fp16 d64") { run_cases(window_cases(), Dtype::kFloat16, 64); }
TEST("windows bf16 d128") { run_cases(window_cases(), Dtype::kBFloat16, 128); }
TEST("windows bf16 d256") { run_cases(window_cases(), Dtype::kBFloat16, 256); }
TEST("in use fp16 d64") { run_cases(used_cases(), Dtype::kFloat16, 64); }
TEST("in use bf16 d128") { run_cases(used_cases(), Dtype::kBFloat16, 128); }
TEST("in use fp16 d192") { run_cases(used_cases(), Dtype::kFloat16, 192); }
TEST("shapes fp16 d32") { run_cases(shape_cases(), Dtype::kFloat16, 32); }
TEST("shapes bf16 d96") { run_cases(shape_cases(), Dtype::kBFloat16, 96); }
TEST("shapes fp16 d192") { run_cases(shape_cases(), Dtype::kFloat16, 192); }
TEST("shapes bf16 d256") { run_cases(shape_cases(), Dtype::kBFloat16, 256); }
TEST("options bf16 d192") { run_cases(option_cases(), Dtype::kBFloat16, 192); }
TEST("options fp16 d256") { run_cases(option_cases(), Dtype::kFloat16, 256); }
