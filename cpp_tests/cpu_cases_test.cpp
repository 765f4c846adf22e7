// The CPU op over the case table through the C API: all dtypes, two head dims that are multiples of
// every vector length and one that is of none.
#include "cases.h"
#include "check.h"
#include "compare.h"
#include "error_table.h"
#include "runner.h"

using namespace flashtile::test;

namespace {

// Bitwise, so that NaN equals NaN.
bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void run_case(const Setup& setup, const Backend& backend, ErrorTable& table) {
  const RunResult result = Run(setup, backend)();
  CHECK_MESSAGE(result.error.empty(), setup.name() + ": " + result.error);
  if (!result.error.empty()) return;
  const Verdict verdict = compare(setup, Truth(setup), result.values);
  CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
  table.add("cpu", setup.dtype, setup.head_dim, verdict, setup.forward_only());
  if (!setup.spec.deterministic) return;
  const AttentionOutput again = Run(setup, backend)().values;
  CHECK(identical(again.out, result.values.out) && identical(again.dq, result.values.dq) &&
        identical(again.dk, result.values.dk) && identical(again.dv, result.values.dv));
}

void run_cases(Dtype dtype) {
  const Backend backend = cpu_backend();
  ErrorTable table;
  uint64_t seed = 1;
  for (const auto& cases : {shape_cases(), option_cases(), varlen_cases()}) {
    for (const Case& spec : cases) {
      for (const int head_dim : {64, 128, 37}) {
        for (const bool causal : {false, true}) {
          if (spec.has(causal))
            run_case(make_setup(spec, dtype, head_dim, causal, seed++), backend, table);
        }
      }
    }
  }
  table.print();
}

}  // namespace

TEST("all cases fp16") { run_cases(Dtype::kFloat16); }
TEST("all cases bf16") { run_cases(Dtype::kBFloat16); }
TEST("all cases fp32") { run_cases(Dtype::kFloat32); }
TEST("all cases fp64") { run_cases(Dtype::kFloat64); }
