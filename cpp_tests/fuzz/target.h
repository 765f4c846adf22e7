// What the fuzzer runs cases on: the CPU op, or the kernels on the PTX machine.
#pragma once

#include <string>

#include "../support/attempt.h"
#include "random_cache.h"
#include "random_case.h"

namespace flashtile::test {

struct FuzzTarget {
  std::string unavailable;  // why nothing can run; "" when it can
  FuzzRange range;
  Attempt (*attempt)(const Setup& setup, const Truth& truth, uint64_t seed) = nullptr;
  CacheBackend cache;  // empty: no cases of key/value caches
};

// With an instruction set by its name, or with the one that the op chooses.
FuzzTarget cpu_target(const std::string& instruction_set);

// On one device model per case, chosen by the seed among those whose name contains `device`.
FuzzTarget machine_target(const std::string& device);

}  // namespace flashtile::test
