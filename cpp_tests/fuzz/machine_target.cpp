// The kernels on the PTX machine: the seed chooses the device model and the schedule.
#include "../kernels/cache_on_device.h"
#include "target.h"

namespace flashtile::test {
namespace {

std::string wanted_device;

Schedule schedule_of(uint64_t seed) {
  std::vector<Schedule> devices;
  for (const auto& [name, its_schedules] : schedules_by_device()) {
    if (name.find(wanted_device) != std::string::npos) devices.push_back(its_schedules.front());
  }
  Schedule schedule = devices[seed % devices.size()];
  schedule.seed = seed;
  return schedule;
}

Attempt attempt(const Setup& setup, const Truth& truth, uint64_t seed) {
  const Schedule first = schedule_of(seed);
  Schedule second = first;
  second.seed += 1;
  std::vector<Schedule> chosen = {first};
  if (setup.spec.deterministic) chosen.push_back(second);
  return attempt_on_device(chosen, setup, truth, cuda_backend());
}

std::string append(Appending& what, const flashtile_problem& problem) {
  begin(schedule_of(what.call.spec().layout_seed));
  const std::string error = append_on(cuda_backend(), what, problem);
  return error + finish();
}
CacheResult forward(CacheCall& call, const flashtile_problem& problem) {
  return run_under(schedule_of(call.spec().layout_seed), call, problem);
}

}  // namespace

FuzzTarget machine_target(const std::string& device) {
  wanted_device = device;
  FuzzTarget target;
  target.unavailable = device_unavailable();
  target.range.dtypes = {Dtype::kFloat16, Dtype::kBFloat16};
  target.range.work = 6'000'000;
  target.attempt = attempt;
  target.cache = {append, forward};
  return target;
}

}  // namespace flashtile::test
