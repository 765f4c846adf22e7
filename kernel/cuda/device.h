// The GPU that a call runs on: making it current, and asking what it is. Host code.
#pragma once

#include "config.cuh"
#include "params.h"
#include "status.h"

namespace flashtile::cuda {

struct Device {
  int capability = 0;     // 80, 89, 90
  int shared_memory = 0;  // bytes per block, opt-in
  Memory memory = Memory::kSmall;
};

// The current device; a refusal where this build has no kernels for it.
Status query_device(Device& device);

// Makes `index` current for this scope; -1 keeps the caller's device.
class DeviceScope {
 public:
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_ = FLASHTILE_OK;
};

// fp16 and bf16 are served.
Status check_dtype(const Problem& problem);

}  // namespace flashtile::cuda
