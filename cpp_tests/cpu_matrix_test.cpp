// Every row of matrix.h on the CPU op: out, LSE, dq, dk, dv against manual attention in fp64.
#include "support/attempt.h"
#include "support/check.h"
#include "support/error_table.h"
#include "support/matrix.h"
#include "support/matrix_report.h"

using namespace flashtile::test;

namespace {

void run_cell(const Cell& cell, ErrorTable& table, MatrixReport& report) {
  const auto make = [&](uint64_t seed) {
    return make_setup(cell.spec, cell.dtype, cell.head_dims, cell.mask, seed);
  };
  const uint64_t seed = static_cast<uint64_t>(cell.index) + 1;
  const Attempt attempt = attempt_draws_on_cpu(seed, make);
  const Setup setup = make(seed);
  CHECK_MESSAGE(attempt.passed(), setup.name() + " on the CPU: " + attempt.wrong);
  for (const Verdict& verdict : attempt.verdicts) table.add("cpu", setup, verdict);
  report.add(cell, "forward", attempt.forward_passed() ? Outcome::kPassed : Outcome::kFailed);
  report.add(cell, "backward", attempt.passed() ? Outcome::kPassed : Outcome::kFailed);
}

void run_dtype(Dtype dtype) {
  ErrorTable table;
  MatrixReport report("cpu");
  for (const Cell& cell : matrix()) {
    if (cell.dtype == dtype) run_cell(cell, table, report);
  }
  table.print();
  report.print();
}

}  // namespace

TEST("matrix fp16") { run_dtype(Dtype::kFloat16); }
TEST("matrix bf16") { run_dtype(Dtype::kBFloat16); }
TEST("matrix fp32") { run_dtype(Dtype::kFloat32); }
TEST("matrix fp64") { run_dtype(Dtype::kFloat64); }
