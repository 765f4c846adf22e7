// The CPU op's instruction sets, one after the other.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "flashtile/flashtile.h"
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
inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found;
  for (const InstructionSet& set : std::vector<InstructionSet>{{"portable"},
                                                               {"avx2"},
                                                               {"avx512"},
                                                               {"avx512_bf16", true},
                                                               {"amx", true},
                                                               {"amx-emulated", true}}) {
    const ForcedInstructionSet forced(set.name);
    flashtile_build_info info = {};
    info.struct_size = sizeof info;
    if (flashtile_get_build_info(&info) == FLASHTILE_OK &&
        info.cpu_instruction_set_used == set.name) {
      found.push_back(set);
    } else {
      std::printf("  not on this machine: %s\n", set.name.c_str());
    }
  }
  return found;
}

}  // namespace flashtile::test
