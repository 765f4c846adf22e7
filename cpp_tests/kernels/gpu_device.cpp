// A real GPU as the device of the kernel tests.
#include <cuda_runtime_api.h>

#include "device.h"

namespace flashtile::test {

std::string device_unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no GPU: ") + cudaGetErrorString(error);
  if (count == 0) return "no GPU: cudaGetDeviceCount found none";
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess)
    return "no GPU: cudaGetDeviceProperties failed";
  return properties.major >= 8
             ? ""
             : std::string(properties.name) + " has a compute capability below 8.0";
}

std::vector<Schedule> schedules() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return {};
  return {{properties.name, static_cast<int>(properties.sharedMemPerBlockOptin), 0}};
}

void begin(const Schedule&) {}

std::string finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace flashtile::test
