// The CPU op's instruction sets, one after the other.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "numbers.h"

namespace flashtile::test {

struct InstructionSet {
  std::string name;
  bool only_bfloat16 = false;  // its other engines are those of another set

  bool has(Dtype dtype) const { return !only_bfloat16 || dtype == Dtype::kBFloat16; }
};

// While one lives, the CPU op runs on this instruction set.
class ForcedInstructionSet {
 public:
  explicit ForcedInstructionSet(const std::string& name) {
    setenv("FLASHTILE_CPU_ISA", name.c_str(), 1);
  }
  ~ForcedInstructionSet() { unsetenv("FLASHTILE_CPU_ISA"); }
  ForcedInstructionSet(const ForcedInstructionSet&) = delete;
  ForcedInstructionSet& operator=(const ForcedInstructionSet&) = delete;
};

// Those that this build and this machine have, the emulated tiles included.
std::vector<InstructionSet> instruction_sets();

}  // namespace flashtile::test
