// mbarrier objects: arrivals, transaction bytes, phases, and what a phase hands over.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"

namespace ptx {

struct Mbarrier {
  uint32_t offset = 0;    // in shared memory
  uint32_t expected = 0;  // arrivals of a phase
  uint32_t pending = 0;   // arrivals still to come
  int64_t bytes = 0;      // announced and not yet arrived
  uint64_t phase = 0;     // of the phase that is running
  bool fenced = false;    // fence.mbarrier_init stands behind the initialisation
  int init_thread = 0;    // who initialised it, and when
  uint32_t init_stamp = 0;
  uint32_t init_pc = 0;
  uint32_t current = 0;        // completion of the running phase
  uint32_t previous = 0;       // of the one before; 0: none
  uint32_t copy_pc = 0;        // a bulk copy of the running phase, 0: none
  uint32_t previous_copy = 0;  // of the one before, until somebody waits for it
  int copy_thread = 0;
  Release collecting;  // of the arrivals of this phase
  Release released;    // of the previous phase

  // The two questions that a wait asks.
  bool is_complete(uint64_t token) const { return token < phase; }
  bool parity_complete(uint32_t parity) const { return (phase & 1) != (parity & 1); }
};

// By offset.
using Mbarriers = std::map<uint32_t, Mbarrier>;

inline constexpr uint32_t kMaxArrivals = (1u << 20) - 1;

}  // namespace ptx
