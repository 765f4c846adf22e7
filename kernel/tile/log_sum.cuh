// Sums of exponentials that are merged later: of several warps, of several thread blocks.
#pragma once

#include "constants.cuh"

namespace flashtile {

// log2 of a sum of 2^(scale_log2 * S), cut in two: scale_log2 * shift + near. The shift is that of
// the softmax (softmax.cuh), 0 but for huge scores, where one number would have no fraction left.
struct LogSum {
  float shift, near;  // near: -inf where no key was seen

  FLASHTILE_DEVICE float value(float scale_log2) const { return fmaf(shift, scale_log2, near); }

  // 2^(this - reference): 0 for a sum of nothing, whatever the reference.
  FLASHTILE_DEVICE float weight(const LogSum& reference, float scale_log2) const {
    const float exponent = fmaf(shift - reference.shift, scale_log2, near - reference.near);
    return near == negative_infinity() ? 0.0f : ptx::ex2(exponent);
  }

  // The sum that is `weights` times this one.
  FLASHTILE_DEVICE LogSum times(float weights) const { return {shift, near + __log2f(weights)}; }
};

FLASHTILE_DEVICE LogSum log_sum_of_nothing() { return {0.0f, negative_infinity()}; }

}  // namespace flashtile
