// The parameters that users of FlashAttention-2 test (usual_cases.h), on the machine: head dim 64
// and short lengths, each case on the device model that its number says; other head dims and longer
// ones in make test-nightly. The CPU's turn is python/tests/test_usual_parameters.py.
#include <cstdio>

#include "../support/check.h"
#include "../support/usual_cases.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

void run(const char* what, const std::vector<HeadDims>& all_head_dims, Lengths lengths) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(all_head_dims.back()) == 0)
    SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  std::vector<std::vector<Schedule>> devices;
  for (const auto& device : schedules_by_device()) devices.push_back(device.second);
  const std::vector<UsualCase> cases = usual_cases(all_head_dims, lengths);
  size_t passed = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const UsualCase& one = cases[i];
    const std::vector<Schedule> chosen =
        schedules_of_case(devices[i % devices.size()], i, one.spec.deterministic);
    const Attempt attempt = attempt_draws(i + 1, [&](uint64_t seed) {
      const Setup setup = make_setup(one.spec, one.dtype, one.head_dims, one.mask, seed);
      return attempt_on_device(chosen, setup, Truth(setup), backend);
    });
    CHECK_MESSAGE(attempt.passed(), attempt.wrong);
    passed += attempt.passed() ? 1 : 0;
  }
  std::printf("usual parameters, %s: %zu of %zu\n", what, passed, cases.size());
}

}  // namespace

TEST("usual parameters d64") { run("d64", {64}, Lengths::kShort); }
TEST("usual parameters of every head dim") {
  if (!is_nightly()) SKIP("make test-nightly has it");
  run("every head dim", {32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256}, Lengths::kShort);
}
TEST("usual parameters of long sequences") {
  if (!is_nightly()) SKIP("make test-nightly has it");
  run("long sequences", {64}, Lengths::kLong);
}
