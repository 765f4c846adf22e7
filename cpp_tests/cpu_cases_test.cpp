// The CPU op over the case table through the C API: all dtypes, on every instruction set of this
// machine.
#include "support/attempt.h"
#include "support/cases.h"
#include "support/check.h"
#include "support/error_table.h"
#include "support/instruction_sets.h"

using namespace flashtile::test;

namespace {

// Every case with each of these head dims, under each of its masks.
void run_cases(const std::vector<Case>& cases, const std::vector<HeadDims>& all_head_dims,
               Dtype dtype) {
  const std::vector<InstructionSet> sets = instruction_sets();
  ErrorTable table;
  uint64_t seed = 1;
  for (const Case& spec : cases) {
    for (const HeadDims& head_dims : all_head_dims) {
      for (const Mask& mask : spec.masks) {
        const Setup setup = make_setup(spec, dtype, head_dims, mask, seed);
        const Truth truth(setup);
        for (const InstructionSet& set : sets) {
          if (!set.has(dtype)) continue;
          const ForcedInstructionSet forced(set.name);
          const Attempt attempt = attempt_draws(seed, [&](uint64_t drawn) {
            if (drawn == seed) return attempt_on_cpu(setup, truth);
            const Setup other = make_setup(spec, dtype, head_dims, mask, drawn);
            return attempt_on_cpu(other, Truth(other));
          });
          CHECK_MESSAGE(attempt.passed(), set.name + " " + setup.name() + ": " + attempt.wrong);
          for (const Verdict& verdict : attempt.verdicts)
            table.add("cpu " + set.name, setup, verdict);
        }
        ++seed;
      }
    }
  }
  table.print();
}

// Head dims that are a multiple of every vector length, and of none.
void run_table(Dtype dtype) {
  run_cases(joined({shape_cases(), option_cases(), varlen_cases()}), {64, 37}, dtype);
}
void run_bands(Dtype dtype) { run_cases(window_cases(), {64, {40, 19}}, dtype); }
void run_rows_in_use(Dtype dtype) { run_cases(used_cases(), {64, {19, 40}}, dtype); }
void run_head_dims(Dtype dtype) {
  std::vector<HeadDims> all = unequal_head_dims();
  for (const HeadDims& dims : equal_head_dims()) all.push_back(dims);
  run_cases(head_dim_cases(), all, dtype);
}

}  // namespace

TEST("shapes, options, varlen fp16") { run_table(Dtype::kFloat16); }
TEST("shapes, options, varlen bf16") { run_table(Dtype::kBFloat16); }
TEST("shapes, options, varlen fp32") { run_table(Dtype::kFloat32); }
TEST("shapes, options, varlen fp64") { run_table(Dtype::kFloat64); }
TEST("windows and alignments fp16") { run_bands(Dtype::kFloat16); }
TEST("windows and alignments bf16") { run_bands(Dtype::kBFloat16); }
TEST("windows and alignments fp32") { run_bands(Dtype::kFloat32); }
TEST("windows and alignments fp64") { run_bands(Dtype::kFloat64); }
TEST("rows in use fp16") { run_rows_in_use(Dtype::kFloat16); }
TEST("rows in use bf16") { run_rows_in_use(Dtype::kBFloat16); }
TEST("rows in use fp32") { run_rows_in_use(Dtype::kFloat32); }
TEST("rows in use fp64") { run_rows_in_use(Dtype::kFloat64); }
TEST("head dims fp16") { run_head_dims(Dtype::kFloat16); }
TEST("head dims bf16") { run_head_dims(Dtype::kBFloat16); }
TEST("head dims fp32") { run_head_dims(Dtype::kFloat32); }
TEST("head dims fp64") { run_head_dims(Dtype::kFloat64); }
