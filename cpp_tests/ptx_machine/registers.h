// Places for virtual registers in a warp's register file: PTX names thousands, few live at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "parse.h"

namespace ptx {

// What one instruction does to registers and control flow.
struct Flow {
  std::vector<int> uses;
  std::vector<int> defs;
  std::vector<int> kept;     // registers that need a place of their own
  std::vector<int> targets;  // branch targets, instruction indices
  bool guarded = false;      // its definitions may not happen
  bool ends = false;         // control does not fall through
};

// Byte offset of each register, from `layout` upwards; `layout` grows to the end. Predicates take 4
// bytes (one bit per lane), 16- and 32-bit registers 128, 64-bit registers 256. The registers that
// some instruction keeps come first, up to `kept_end`, and share no place.
std::vector<int32_t> assign_registers(const std::vector<Flow>& code,
                                      const std::vector<RegisterClass>& registers, uint32_t& layout,
                                      uint32_t& kept_end);

}  // namespace ptx
