#include "device_memory.h"

#include <cstdlib>
#include <cstring>

namespace flashtile::test {

Backend cpu_backend() {
  return {
      .device = FLASHTILE_CPU,
      .allocate = [](size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); },
      .release = [](void* memory) { std::free(memory); },
      .copy_in = [](void* device, const void* host,
                    size_t bytes) { std::memcpy(device, host, bytes); },
      .copy_out = [](void* host, const void* device,
                     size_t bytes) { std::memcpy(host, device, bytes); }};
}

DeviceBytes::DeviceBytes(const Backend& backend, const void* host, size_t bytes)
    : backend_(backend), bytes_(bytes) {
  if (bytes == 0) return;
  memory_ = backend.allocate(bytes);
  backend.copy_in(memory_, host, bytes);
}

DeviceTensor::DeviceTensor(const Backend& backend, const HostTensor& tensor)
    : host(tensor), bytes(backend, tensor.bytes().data(), tensor.bytes().size()) {}

const HostTensor& DeviceTensor::fetch() {
  bytes.copy_out(host.bytes().data());
  return host;
}

}  // namespace flashtile::test
