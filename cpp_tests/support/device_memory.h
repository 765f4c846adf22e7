// Memory of a backend, the CPU, the machine or a GPU, with copies of what the host has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "flashtile/flashtile.h"
#include "host_tensor.h"

namespace flashtile::test {

// Where a backend's memory comes from. `bytes` is never 0.
struct Backend {
  flashtile_device device = FLASHTILE_CPU;
  int device_index = -1;  // what problems say; -1: the current device
  void* (*allocate)(size_t bytes) = nullptr;
  void (*release)(void* memory) = nullptr;
  void (*copy_in)(void* device, const void* host, size_t bytes) = nullptr;
  void (*copy_out)(void* host, const void* device, size_t bytes) = nullptr;
};

inline Backend cpu_backend() {
  return {
      .device = FLASHTILE_CPU,
      .allocate = [](size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); },
      .release = [](void* memory) { std::free(memory); },
      .copy_in = [](void* device, const void* host,
                    size_t bytes) { std::memcpy(device, host, bytes); },
      .copy_out = [](void* host, const void* device,
                     size_t bytes) { std::memcpy(host, device, bytes); }};
}

// Memory of a backend with the bytes of a host vector; NULL when there are none.
class DeviceBytes {
 public:
  DeviceBytes(const Backend& backend, const void* host, size_t bytes)
      : backend_(backend), bytes_(bytes) {
    if (bytes == 0) return;
    memory_ = backend.allocate(bytes);
    backend.copy_in(memory_, host, bytes);
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() {
    if (memory_ != nullptr) backend_.release(memory_);
  }
  void copy_out(void* host) const {
    if (bytes_ > 0) backend_.copy_out(host, memory_, bytes_);
  }
  uint8_t* data() const { return static_cast<uint8_t*>(memory_); }

 private:
  const Backend& backend_;
  size_t bytes_;
  void* memory_ = nullptr;
};

// A host tensor together with its copy on the backend.
struct DeviceTensor {
  HostTensor host;
  DeviceBytes bytes;

  DeviceTensor(const Backend& backend, const HostTensor& tensor)
      : host(tensor), bytes(backend, tensor.bytes().data(), tensor.bytes().size()) {}
  uint8_t* data() const {
    return bytes.data() == nullptr ? nullptr : bytes.data() + host.start_byte();
  }
  flashtile_tensor view() const {
    return {data(), host.strides().batch, host.strides().seq, host.strides().head};
  }
  const HostTensor& fetch() {
    bytes.copy_out(host.bytes().data());
    return host;
  }
};

}  // namespace flashtile::test
