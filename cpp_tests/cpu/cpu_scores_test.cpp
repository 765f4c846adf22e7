// Scores on the CPU: every option against manual attention in fp64, alone and with others, forward
// and backward, on every instruction set.
#include <string>
#include <vector>

#include "../support/attempt.h"
#include "../support/check.h"
#include "../support/compare_scores.h"
#include "../support/instruction_sets.h"
#include "../support/score_cases.h"

using namespace flashtile::test;

namespace {

void check_case(const Case& spec, Dtype dtype, const HeadDims& dims, const Mask& mask,
                const std::string& set) {
  const Setup setup = make_setup(spec, dtype, dims, mask);
  const Truth truth(setup);
  const RunResult result = Run(setup, cpu_backend())();
  const std::string where = set + " " + setup.name() + ": ";
  CHECK_EQ(where + result.error, where);
  const Verdict verdict = compare(setup, truth, result);
  CHECK_MESSAGE(verdict.passed(), where + verdict.text());
}

void check_all(const NamedScores& scores, Dtype dtype, const Mask& mask, const std::string& set) {
  for (Case spec : score_shapes()) {
    spec.name += ", " + scores.name;
    spec.scores = scores.spec;
    check_case(spec, dtype, dtype == Dtype::kBFloat16 ? HeadDims(40) : HeadDims(24, 40), mask, set);
  }
}

}  // namespace

TEST("every option alone, fp32 and bf16, full and causal") {
  for (const NamedScores& scores : single_options()) {
    check_all(scores, Dtype::kFloat32, kFull, "");
    check_all(scores, Dtype::kBFloat16, kCausal, "");
  }
}

TEST("every option in fp64, with exact numbers in fp64, and in fp16") {
  for (NamedScores scores : single_options()) {
    check_all(scores, Dtype::kFloat16, {20, 5}, "");
    for (BiasSpec& bias : scores.spec.bias) bias.dtype = Dtype::kFloat64;
    scores.spec.sink_dtype = scores.spec.exact_dtype = Dtype::kFloat64;
    check_all(scores, Dtype::kFloat64, kCausalTopLeft, "");
  }
}

TEST("all options together, on every instruction set") {
  for (const InstructionSet& set : instruction_sets()) {
    const ForcedInstructionSet forced(set.name);
    for (const Mask& mask : {kFull, kCausal}) {
      if (!set.only_bfloat16) check_all(all_options(), Dtype::kFloat32, mask, set.name);
      check_all(all_options(), Dtype::kBFloat16, mask, set.name);
    }
  }
}

TEST("long keys, in parts") {
  const Case spec = {.name = "parts",
                     .heads = 2,
                     .heads_kv = 1,
                     .seqlen_q = 1100,
                     .seqlen_k = 2300,
                     .scores = all_options().spec};
  check_case(spec, Dtype::kFloat32, 16, kCausal, "");
  check_case(spec, Dtype::kBFloat16, 16, kFull, "");
}
