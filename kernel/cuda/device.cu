#include "cuda/device.h"

#include <cuda_runtime.h>

#include <cstdlib>

#include "api/check.h"
#include "build_config.h"
#include "cuda/slices.cuh"
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

// What the device is. A refusal where this build has no kernels for it.
Status query_device(Device& device) {
  int major = 0, minor = 0;
  const struct {
    int& value;
    cudaDeviceAttr attribute;
    const char* call;
  } questions[] = {
      {major, cudaDevAttrComputeCapabilityMajor, "cudaDeviceGetAttribute(ComputeCapabilityMajor)"},
      {minor, cudaDevAttrComputeCapabilityMinor, "cudaDeviceGetAttribute(ComputeCapabilityMinor)"},
      {device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
       "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)"}};
  for (const auto& [value, attribute, call] : questions) {
    if (Status s = check_cuda(cudaDeviceGetAttribute(&value, attribute, device.index), call))
      return s;
  }
  device.capability = 10 * major + minor;
  if (device.capability < 80) {
    return fail(FLASHTILE_UNSUPPORTED,
                "the device has compute capability %d.%d; allowed: 8.0 and later", major, minor);
  }
  const bool class_built = memory_of(device) == Memory::kLarge ? kHasLargeMemory : kHasSmallMemory;
  if (!class_built || !has_image(device.capability)) {
    return fail(FLASHTILE_NOT_BUILT,
                "the device has compute capability %d.%d; allowed: those of this build, %s (set "
                "CMAKE_CUDA_ARCHITECTURES)",
                major, minor, kArchitectureList);
  }
  return FLASHTILE_OK;
}

}  // namespace

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

Status DeviceScope::enter(Device& device) {
  int current = 0;
  if (Status s = check_cuda(cudaGetDevice(&current), "cudaGetDevice")) return s;
  device.index = current;
  if (wanted_ >= 0 && wanted_ != current) {
    if (Status s = set_device(wanted_)) return s;
    previous_ = current;
    device.index = wanted_;
  }
  return query_device(device);
}

Status check_dtype(const Problem& problem) {
  if (problem.dtype == Dtype::kFloat16 || problem.dtype == Dtype::kBFloat16) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED, "dtype is %s; allowed on CUDA: float16, bfloat16",
              dtype_name(problem.dtype));
}

}  // namespace flashtile::cuda
