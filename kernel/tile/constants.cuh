// Numbers that forward and backward share.
#pragma once

namespace flashtile {

inline constexpr float kLog2e = 1.442695040888963407f;
inline constexpr float kLn2 = 0.693147180559945309f;

}  // namespace flashtile
