// Notes: what a main loop seldom needs, kept in shared memory, one 16-byte word per subject, since
// the loop has no register to spare. One thread writes a word; others read it where they need it.
#pragma once

#include "ptx/common.cuh"

namespace flashtile {

// `Notes` has kOffset, the word's place among the notes at `address`.
template <class Notes>
FLASHTILE_DEVICE Notes read_notes(uint32_t address) {
  return __builtin_bit_cast(Notes, ptx::lds_u32x4(address + Notes::kOffset));
}
template <class Notes>
FLASHTILE_DEVICE void write_notes(uint32_t address, const Notes& notes) {
  ptx::sts_u32x4(address + Notes::kOffset, __builtin_bit_cast(uint4, notes));
}

}  // namespace flashtile
