// The GPU that a call runs on: making it current, and asking what it is. Host code.
#pragma once

#include "params.h"
#include "status.h"

namespace flashtile::cuda {

struct Device {
  int index = 0;
  int capability = 0;     // 80, 89, 90
  int shared_memory = 0;  // bytes per block, opt-in
};

// Makes a device current from enter() to its own end; -1 keeps the caller's.
class DeviceScope {
 public:
  explicit DeviceScope(int wanted = -1) : wanted_(wanted) {}
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  // Before it enters: which device it will be.
  void set_wanted(int index) { wanted_ = index; }
  // Fills `device`; a refusal where this build has no kernels for it.
  Status enter(Device& device);

 private:
  int wanted_;
  int previous_ = -1;  // to return to; -1: nothing was changed
};

// Refuses every dtype but fp16 and bf16.
Status check_dtype(const Problem& problem);

}  // namespace flashtile::cuda
