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
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  const bool sm90_built = flashtile_get_build_info(&info) == FLASHTILE_OK &&
                          std::string(info.cuda_architectures).find("90a") != std::string::npos;
  return {{.device = properties.name,
           .shared_memory = static_cast<int>(properties.sharedMemPerBlockOptin),
           .has_sm90 = sm90_built && properties.major == 9 && properties.minor == 0}};
}

void begin(const Schedule&) {}

std::string finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace flashtile::test
