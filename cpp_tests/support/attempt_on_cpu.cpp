// What of attempt.h calls the C API, apart: a program that has none of it may judge attempts, too.
#include "attempt.h"

#include <string>

#include "device_memory.h"
#include "flashtile/flashtile.h"

namespace flashtile::test {

Attempt attempt_on_cpu(const Setup& setup, const Truth& truth) {
  static const Backend backend = cpu_backend();
  Attempt attempt;
  attempt.result = Run(setup, backend)();
  attempt.wrong = attempt.result.error;
  if (!attempt.wrong.empty()) return attempt;
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  flashtile_get_build_info(&info);
  const std::string kernel =
      std::string("_cpu_") + info.cpu_instruction_set_used + "_" + name_of(setup.dtype) +
      (setup.spec.dtype_kv ? std::string("_kv_") + name_of(*setup.spec.dtype_kv) : "");
  for (const std::string& plan : {attempt.result.forward_plan, attempt.result.backward_plan}) {
    if (!plan.empty() && !plan.ends_with(kernel)) attempt.wrong += "ran " + plan + "; ";
  }
  if (setup.spec.deterministic && !identical(attempt.result, Run(setup, backend)()))
    attempt.wrong += "not the bits of the first run; ";
  judge(setup, truth, attempt);
  return attempt;
}

Attempt attempt_draws_on_cpu(uint64_t seed, const std::function<Setup(uint64_t)>& make) {
  return attempt_draws(seed, [&](uint64_t drawn) {
    const Setup setup = make(drawn);
    return attempt_on_cpu(setup, Truth(setup));
  });
}

}  // namespace flashtile::test
