// The kernels on the PTX machine: the seed chooses the device model and the schedule.
#include "../kernels/kernel_cases.h"
#include "target.h"

namespace flashtile::test {
namespace {

std::string wanted_device;

Attempt attempt(const Setup& setup, const Truth& truth, uint64_t seed) {
  std::vector<Schedule> devices;
  for (const auto& [name, its_schedules] : schedules_by_device()) {
    if (name.find(wanted_device) != std::string::npos) devices.push_back(its_schedules.front());
  }
  Schedule first = devices[seed % devices.size()];
  first.seed = seed;
  Schedule second = first;
  second.seed += 1;
  std::vector<Schedule> chosen = {first};
  if (setup.spec.deterministic) chosen.push_back(second);
  return attempt_on_device(chosen, setup, truth, cuda_backend());
}

}  // namespace

FuzzTarget machine_target(const std::string& device) {
  wanted_device = device;
  FuzzTarget target;
  target.unavailable = device_unavailable();
  target.range.dtypes = {Dtype::kFloat16, Dtype::kBFloat16};
  target.range.work = 6'000'000;
  target.attempt = attempt;
  return target;
}

}  // namespace flashtile::test
