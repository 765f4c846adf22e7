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

// Makes a device current for its lifetime.
class Current {
 public:
  explicit Current(int device) {
    require(cudaGetDevice(&previous_), "cudaGetDevice");
    require(cudaSetDevice(device), "cudaSetDevice");
  }
  ~Current() { cudaSetDevice(previous_); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int previous_ = 0;
};

template <int kDevice>
Backend backend_of() {
  static const Backend plain = cuda_backend();
  return {.device = FLASHTILE_CUDA,
          .device_index = kDevice,
          .allocate =
              [](size_t bytes) {
                const Current current(kDevice);
                return plain.allocate(bytes);
              },
          .release =
              [](void* memory) {
                const Current current(kDevice);
                plain.release(memory);
              },
          .copy_in =
              [](void* device, const void* host, size_t bytes) {
                const Current current(kDevice);
                plain.copy_in(device, host, bytes);
              },
          .copy_out =
              [](void* host, const void* device, size_t bytes) {
                const Current current(kDevice);
                plain.copy_out(host, device, bytes);
              }};
}

}  // namespace

Backend cuda_backend_of(int device) { return device == 0 ? backend_of<0>() : backend_of<1>(); }

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
