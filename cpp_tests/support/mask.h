// Which keys a query sees, as the contract in flashtile.h says it: the tests' own statement of it.
#pragma once

#include <cstdint>
#include <string>

namespace flashtile::test {

// Keys on each side of the diagonal, -1: no bound. The diagonal meets the bottom right corner of
// the score matrix, or its top left.
struct Mask {
  int64_t left = -1, right = -1;
  bool top_left = false;

  bool operator==(const Mask&) const = default;
};

inline constexpr Mask kFull = {-1, -1}, kCausal = {-1, 0}, kCausalTopLeft = {-1, 0, true};

// Whether query i of a sequence sees its key j. Compares distances: a bound may be any int64.
inline bool sees(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k, int64_t i, int64_t j) {
  const int64_t shift = mask.top_left ? 0 : seqlen_k - seqlen_q;
  const int64_t beyond = j - (i + shift);  // keys right of the diagonal, negative: left of it
  return (mask.left < 0 || -beyond <= mask.left) && (mask.right < 0 || beyond <= mask.right);
}

// What a plan's name says of a mask.
inline const char* kind_of(const Mask& mask) {
  if (mask.left == -1 && mask.right == -1) return "full";
  return mask.left == -1 && mask.right == 0 ? "causal" : "window";
}

inline std::string name_of(const Mask& mask) {
  const std::string kind = kind_of(mask);
  const std::string bounds = std::to_string(mask.left) + "," + std::to_string(mask.right);
  return (kind == "window" ? kind + " " + bounds : kind) + (mask.top_left ? " top-left" : "");
}

}  // namespace flashtile::test
