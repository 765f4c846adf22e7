// Every cell of score_matrix.h on the CPU op: out, LSE, the largest logits and all gradients
// against manual attention in fp64, or a refusal with the stated sentence.
#include "support/check.h"
#include "support/error_table.h"
#include "support/score_matrix.h"
#include "support/score_matrix_report.h"

using namespace flashtile::test;

namespace {

void run_cell(const Cell& cell, ErrorTable& table, MatrixReport& report) {
  const auto make = [&](uint64_t seed) {
    return make_setup(cell.spec, cell.dtype, cell.head_dims, cell.mask, seed);
  };
  const uint64_t seed = static_cast<uint64_t>(cell.index) + 1;
  const Setup setup = make(seed);
  Run::Refusals said;
  if (!expected_score_refusals(cell).backward.empty()) said = Run(setup, cpu_backend()).refusals();
  const auto attempt = [&] {
    const Attempt result = attempt_draws_on_cpu(seed, make);
    for (const Verdict& verdict : result.verdicts) table.add("cpu", setup, verdict);
    return result;
  };
  report_score_cell(cell, setup.name() + " on the CPU", said, attempt, report);
}

void run_dtype(Dtype dtype) {
  ErrorTable table;
  MatrixReport report("cpu");
  for (const Cell& cell : score_matrix()) {
    if (cell.dtype == dtype) run_cell(cell, table, report);
  }
  table.print();
  report.print();
}

}  // namespace

TEST("scores fp16") { run_dtype(Dtype::kFloat16); }
TEST("scores bf16") { run_dtype(Dtype::kBFloat16); }
TEST("scores fp32") { run_dtype(Dtype::kFloat32); }
TEST("scores fp64") { run_dtype(Dtype::kFloat64); }
