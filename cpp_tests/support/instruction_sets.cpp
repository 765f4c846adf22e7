#include "instruction_sets.h"

#include <cstdio>

#include "flashtile/flashtile.h"

namespace flashtile::test {

std::vector<InstructionSet> instruction_sets() {
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
