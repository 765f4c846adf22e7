// Memory of a backend, the CPU, the machine or a GPU, with copies of what the host has.
#pragma once

#include <cstddef>
#include <cstdint>

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

Backend cpu_backend();

// Memory of a backend with the bytes of a host vector; NULL when there are none.
class DeviceBytes {
 public:
  DeviceBytes(const Backend& backend, const void* host, size_t bytes);
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

  DeviceTensor(const Backend& backend, const HostTensor& tensor);
  uint8_t* data() const {
    return bytes.data() == nullptr ? nullptr : bytes.data() + host.start_byte();
  }
  flashtile_tensor view() const {
    return {data(), host.strides().batch, host.strides().seq, host.strides().head};
  }
  const HostTensor& fetch();
};

}  // namespace flashtile::test
