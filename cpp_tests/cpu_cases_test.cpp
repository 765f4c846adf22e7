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

// Every case with each of these head dims, under each of its masks.
void run_cases(const std::vector<Case>& cases, const std::vector<HeadDims>& all_head_dims,
               Dtype dtype) {
  const Backend backend = cpu_backend();
  ErrorTable table;
  uint64_t seed = 1;
  for (const Case& spec : cases) {
    for (const HeadDims& head_dims : all_head_dims) {
      for (const Mask& mask : spec.masks)
        run_case(make_setup(spec, dtype, head_dims, mask, seed++), backend, table);
    }
  }
  table.print();
}

void run_table(Dtype dtype) {
  run_cases(joined({shape_cases(), option_cases(), varlen_cases()}), {64, 128, 37}, dtype);
}

}  // namespace

TEST("all cases fp16") { run_table(Dtype::kFloat16); }
TEST("all cases bf16") { run_table(Dtype::kBFloat16); }
TEST("all cases fp32") { run_table(Dtype::kFloat32); }
TEST("all cases fp64") { run_table(Dtype::kFloat64); }
