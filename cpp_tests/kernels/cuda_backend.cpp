// Device memory through the CUDA runtime, whichever stands behind it.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace flashtile::test {
namespace {

void require(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace

Backend cuda_backend() {
  return {.device = FLASHTILE_CUDA,
          .allocate =
              [](size_t bytes) {
                void* memory = nullptr;
                require(cudaMalloc(&memory, bytes), "cudaMalloc");
                return memory;
              },
          .release = [](void* memory) { require(cudaFree(memory), "cudaFree"); },
          .copy_in =
              [](void* device, const void* host, size_t bytes) {
                require(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice),
                        "cudaMemcpy to the device");
              },
          .copy_out =
              [](void* host, const void* device, size_t bytes) {
                require(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost),
                        "cudaMemcpy to the host");
              }};
}

}  // namespace flashtile::test
