// The CPU op with one instruction set: the one that it chooses, or one by name.
#include <optional>

#include "../support/instruction_sets.h"
#include "target.h"

namespace flashtile::test {
namespace {

const std::vector<Dtype> kAllDtypes = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32,
                                       Dtype::kFloat64};

Attempt attempt(const Setup& setup, const Truth& truth, uint64_t) {
  return attempt_on_cpu(setup, truth);
}

}  // namespace

FuzzTarget cpu_target(const std::string& instruction_set) {
  static std::optional<ForcedInstructionSet> forced;
  FuzzTarget target;
  target.range.work = 12'000'000;
  target.attempt = attempt;
  target.cache = cpu_cache_backend();
  if (instruction_set.empty()) {
    target.range.dtypes = kAllDtypes;
    return target;
  }
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name != instruction_set) continue;
    std::copy_if(kAllDtypes.begin(), kAllDtypes.end(), std::back_inserter(target.range.dtypes),
                 [&](Dtype dtype) { return set.has(dtype); });
  }
  forced.emplace(instruction_set);
  if (target.range.dtypes.empty())
    target.unavailable = "this machine or this build has no " + instruction_set;
  return target;
}

}  // namespace flashtile::test
