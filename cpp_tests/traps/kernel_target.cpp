#include "../kernels/kernel_cases.h"
#include "large_memory.h"
#include "target.h"

namespace flashtile::test {
namespace {

void require_device() {
  const std::string reason = device_unavailable();
  if (reason.empty()) return;
  if (check::gpu_is_required()) check::report(false, __FILE__, __LINE__, "GPU required: " + reason);
  throw check::Skipped{reason};
}

void check_on(std::vector<Schedule> chosen, const Setup& setup, const Truth& truth) {
  if (!setup.spec.deterministic) chosen.resize(1);
  const Attempt attempt = attempt_on_device(chosen, setup, truth, cuda_backend());
  CHECK_MESSAGE(attempt.passed(), attempt.wrong);
}

}  // namespace

const Backend& large_backend() {
  require_device();
  static const Backend backend = cuda_backend();
  return backend;
}

std::vector<Dtype> trap_dtypes() { return half_dtypes(); }

void check_setup(const Setup& setup) {
  require_device();
  const Truth truth(setup);
  for (const auto& [device, its_schedules] : schedules_by_device())
    check_on(its_schedules, setup, truth);
}

void check_setup_once(const Setup& setup) {
  require_device();
  check_on(schedules_by_device().begin()->second, setup, Truth(setup));
}

std::vector<RunResult> results_of(const Setup& setup, int runs) {
  require_device();
  const Backend backend = cuda_backend();
  std::vector<RunResult> results;
  for (const auto& [device, its_schedules] : schedules_by_device()) {
    for (int i = 0; i < runs; ++i) {
      Schedule schedule = its_schedules.front();
      schedule.seed += static_cast<uint64_t>(i) * 100;
      begin(schedule);
      results.push_back(Run(setup, backend)());
      CHECK_EQ(finish() + results.back().error, std::string());
    }
  }
  return results;
}

}  // namespace flashtile::test
