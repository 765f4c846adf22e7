#include <cuda_runtime_api.h>

#include "../kernels/cache_on_device.h"
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

Attempt attempt_on(std::vector<Schedule> chosen, const Setup& setup, const Truth& truth) {
  if (!setup.spec.deterministic) chosen.resize(1);
  return attempt_on_device(chosen, setup, truth, cuda_backend());
}

void check_on(const std::vector<Schedule>& chosen, const Setup& setup, const Truth& truth) {
  const Attempt attempt = attempt_on(chosen, setup, truth);
  CHECK_MESSAGE(attempt.passed(), attempt.wrong);
}

// The schedules of one device, one after the other.
struct Turns {
  std::vector<Schedule> schedules;
  size_t next = 0;
  const Schedule& operator()() { return schedules[next++ % schedules.size()]; }
};

CacheBackend cache_backend(const std::vector<Schedule>& its_schedules) {
  return {
      [turns = Turns{its_schedules}](Appending& what, const flashtile_problem& problem) mutable {
        begin(turns());
        const std::string error = append_on(cuda_backend(), what, problem);
        return error + finish();
      },
      [turns = Turns{its_schedules}](CacheCall& call, const flashtile_problem& problem) mutable {
        const Schedule& schedule = turns();
        CacheResult result = run_under(schedule, call, problem);
        const std::string expected = expected_cache_plan(call, schedule);
        if (result.plan != expected) result.error += "ran " + result.plan + ", not " + expected;
        return result;
      }};
}

}  // namespace

const Backend& large_backend() {
  require_device();
  static const Backend backend = cuda_backend();
  return backend;
}

void leave_to_nightly_on_machine() {
  require_device();
  if (schedules().front().device.starts_with("machine") && !is_nightly())
    SKIP("make test-nightly has it");
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

void check_draws(const std::function<Setup(uint64_t)>& draw) {
  require_device();
  constexpr uint64_t kFirst = 1;
  const Setup first = draw(kFirst);
  const Truth truth(first);
  for (const auto& device : schedules_by_device()) {
    const Attempt attempt = attempt_draws(kFirst, [&](uint64_t seed) {
      if (seed == kFirst) return attempt_on(device.second, first, truth);
      const Setup other = draw(seed);
      return attempt_on(device.second, other, Truth(other));
    });
    CHECK_MESSAGE(attempt.passed(), attempt.wrong);
  }
}

std::vector<RunResult> results_with_late_dout(const Setup& setup) {
  require_device();
  const Backend backend = cuda_backend();
  const Setup early = without_dout(setup);
  const std::vector<uint8_t> work(size_t{16} << 20);
  std::vector<RunResult> results;
  for (const auto& device : schedules_by_device()) {
    begin(device.second.front());
    const DeviceBytes dout(backend, setup.dout.bytes().data(), setup.dout.bytes().size());
    const DeviceBytes busy(backend, work.data(), work.size());
    Run run(early, backend);
    CHECK_EQ(run.forward().error, std::string());
    results.push_back(run.backward([&](void* memory) {  // all of it on the stream of the calls
      for (int i = 0; i < 40; ++i) cudaMemsetAsync(busy.data(), i, work.size(), nullptr);
      const cudaError_t error = cudaMemcpyAsync(memory, dout.data(), setup.dout.bytes().size(),
                                                cudaMemcpyDeviceToDevice, nullptr);
      CHECK_EQ(error, cudaSuccess);
    }));
    CHECK_EQ(finish(), std::string());
  }
  return results;
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

std::vector<CacheBackend> cache_backends() {
  need_device();
  std::vector<CacheBackend> backends;
  for (const auto& [device, its_schedules] : schedules_by_device())
    backends.push_back(cache_backend(its_schedules));
  return backends;
}

}  // namespace flashtile::test
