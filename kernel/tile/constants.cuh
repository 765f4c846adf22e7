// Numbers that forward and backward share.
#pragma once

#include "../ptx/common.cuh"

namespace flashtile {

inline constexpr float kLog2e = 1.442695040888963407f;
inline constexpr float kLn2 = 0.693147180559945309f;

FLASHTILE_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

}  // namespace flashtile
