#include "cuda/device.h"

#include <cuda_runtime.h>

#include <cstdlib>

#include "api/check.h"
#include "build_config.h"
#include "launch.cuh"

namespace flashtile::cuda {
namespace {

Status set_device(int index) {
  const cudaError_t error = cudaSetDevice(index);
  if (error != cudaErrorInvalidDevice) return check_cuda(error, "cudaSetDevice");
  cudaGetLastError();  // reported here, not by the caller's next launch
  return fail(FLASHTILE_INVALID_ARGUMENT,
              "device_index is %d; allowed: -1 (current device) or a CUDA device ordinal", index);
}

// Whether one of the built architectures runs on `capability`: machine code of the same major and
// not a later minor number, or PTX of any earlier one.
bool has_image(int capability) {
  for (const char* entry = kArchitectureList; *entry != '\0';) {
    char* rest = nullptr;
    const int built = static_cast<int>(std::strtol(entry, &rest, 10));
    const bool virtual_only = rest[0] == '-' && rest[1] == 'v';
    if (built <= capability && (virtual_only || built / 10 == capability / 10)) return true;
    while (*rest != '\0' && *rest != ',') ++rest;
    entry = *rest == ',' ? rest + 1 : rest;
  }
  return false;
}

}  // namespace

DeviceScope::DeviceScope(int index) {
  if (index < 0) return;
  status_ = check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (status_ != FLASHTILE_OK || previous_ == index) {
    previous_ = -1;
    return;
  }
  status_ = set_device(index);
  if (status_ != FLASHTILE_OK) previous_ = -1;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

Status query_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  if (Status s = check_cuda(cudaGetDevice(&index), "cudaGetDevice")) return s;
  if (Status s =
          check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
                     "cudaDeviceGetAttribute(ComputeCapabilityMajor)")) {
    return s;
  }
  if (Status s =
          check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
                     "cudaDeviceGetAttribute(ComputeCapabilityMinor)")) {
    return s;
  }
  if (Status s = check_cuda(cudaDeviceGetAttribute(&device.shared_memory,
                                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                            "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)")) {
    return s;
  }
  device.capability = 10 * major + minor;
  device.memory =
      device.shared_memory >= shared_memory_limit(Memory::kLarge) ? Memory::kLarge : Memory::kSmall;
  if (device.capability < 80) {
    return fail(FLASHTILE_UNSUPPORTED,
                "the device has compute capability %d.%d; allowed: 8.0 and later", major, minor);
  }
  const bool class_built = device.memory == Memory::kLarge ? kHasLargeMemory : kHasSmallMemory;
  if (!class_built || !has_image(device.capability)) {
    return fail(FLASHTILE_NOT_BUILT,
                "the device has compute capability %d.%d; allowed: those of this build, %s (set "
                "CMAKE_CUDA_ARCHITECTURES)",
                major, minor, kArchitectureList);
  }
  return FLASHTILE_OK;
}

Status check_dtype(const Problem& problem) {
  if (problem.dtype == Dtype::kFloat16 || problem.dtype == Dtype::kBFloat16) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED, "dtype is %s; allowed on CUDA: float16, bfloat16",
              dtype_name(problem.dtype));
}

}  // namespace flashtile::cuda
