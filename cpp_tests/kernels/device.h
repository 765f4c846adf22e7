// What the kernel tests run on: the PTX machine (machine_device.cpp) or a GPU (gpu_device.cpp).
// Both provide the CUDA runtime, so memory and calls are the same; this is what differs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../support/runner.h"

namespace flashtile::test {

// One way to execute a case: a device model and the seed of its schedule. On a GPU there is one.
struct Schedule {
  std::string device;     // "machine sm_80", or the GPU's name
  int shared_memory = 0;  // bytes a block may use
  uint64_t seed = 0;
  bool has_sm90 = false;  // the kernels for sm_90a are built and run on it
};

// Whether make test-nightly runs.
inline bool is_nightly() { return std::getenv("FLASHTILE_TEST_NIGHTLY") != nullptr; }

// Why nothing can run here; "" when it can.
std::string device_unavailable();

// The schedules that every case runs under: on the machine 3 seeds or more with each device model.
std::vector<Schedule> schedules();

// `deterministic`: the machine demands order among all floating-point additions to one place.
void begin(const Schedule& schedule, bool deterministic = false);

// Waits for the device. Returns what it reported since begin(), "" if nothing.
std::string finish();

// cudaMalloc, cudaMemcpy, cudaFree.
Backend cuda_backend();

// The same on device 0 or 1, whatever the current device is; problems name it.
Backend cuda_backend_of(int device);

// Provides for a device 1. Returns why there is none; "" when there is.
std::string second_device_unavailable();

// Records what `enqueue` puts on a stream; calling the result does it again, and waits. On a GPU a
// CUDA graph, captured once; the machine, which has none, calls enqueue again.
std::function<void()> captured(const std::function<void(CUstream_st*)>& enqueue);

// "large" or "small": the kernels' memory class on this device, as plan names spell it.
inline const char* memory_class(const Schedule& schedule) {
  return schedule.shared_memory >= 163 * 1024 ? "large" : "small";
}

}  // namespace flashtile::test
