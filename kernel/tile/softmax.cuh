// Online softmax (FlashAttention-2, Algorithm 1) in base 2: P = 2^(scale_log2 * S - scale_log2 *
// max).
//
// O and the row sum are rescaled to a new maximum only when some score exceeds the old one by more
// than 2^kSlack: until then P <= 2^kSlack, which fp32 and the 16-bit formats hold as exactly as 1,
// and the final division makes it good. Rows start with a maximum of -3e38 / scale_log2, below
// every score, so no value is special: -inf scores give P = 0, a NaN or +inf score makes its row
// NaN.
//
// Where scale_log2 * max has few fraction bits left (beyond kLargestOffset), its rounding would
// show in P: the largest P of a row would not be 1. A warp that meets such a row subtracts a shift
// from the scores of its rows first, which is exact close to the shift: P = 2^(scale_log2 * (S -
// shift) + offset).
#pragma once

#include "accumulator.cuh"
#include "constants.cuh"
#include "log_sum.cuh"

namespace flashtile {

inline constexpr float kSlack = 8.0f;
inline constexpr float kLargestOffset = 4096.0f;  // rounded by 2^-12 at most: 1 stays 1 in 16 bits
inline constexpr float kNothingSeen = 3.4e38f;    // offset of a row before its first key

// State of one warp's rows: indices [row block][half], rows 16 m + 8 half + lane / 4.
template <int kRows>
struct OnlineSoftmax {
  static constexpr int kRowBlocks = kRows / 16;

  float scale_log2;             // > 0
  float offset[kRowBlocks][2];  // -(max - shift) * scale_log2, equal in the four lanes of a row
  float sum[kRowBlocks][2];     // of P, over this lane's columns
  float slack = kSlack;         // equal in the warp; -inf once it shifts: every block is rescaled
  uint32_t shifts;              // shared memory: [kRows] fp32 of this warp, unset until it shifts

  FLASHTILE_DEVICE OnlineSoftmax(float positive_scale_log2, uint32_t shifts_of_warp)
      : scale_log2(positive_scale_log2), shifts(shifts_of_warp) {
    for_each_row<kRows>([&](int m, int half) {
      offset[m][half] = kNothingSeen;
      sum[m][half] = 0.0f;
    });
  }

  // Makes room for the scores s: raises the maximum and rescales o where it is needed. Subtracts
  // the shifts.
  template <int kKeys, int kCols>
  FLASHTILE_DEVICE void raise_maximum(Accumulator<kRows, kKeys>& s, Accumulator<kRows, kCols>& o) {
    raise_maximum(s, [&](int m, int half, float factor) {
      FLASHTILE_UNROLL
      for (int n = 0; n < o.kColBlocks; ++n) {
        o.d[m][n][2 * half] *= factor;
        o.d[m][n][2 * half + 1] *= factor;
      }
    });
  }

  // The same; where rescaling is needed, calls rescale_row(m, half, factor) for each row of the
  // warp instead. Returns whether it did, the same in all lanes.
  template <int kKeys, class RescaleRow>
  FLASHTILE_DEVICE bool raise_maximum(Accumulator<kRows, kKeys>& s, const RescaleRow& rescale_row) {
    float top[kRowBlocks][2];  // of this lane's columns
    bool exceeds = false;
    for_each_row<kRows>([&](int m, int half) {
      top[m][half] = fmaxf(s.d[m][0][2 * half], s.d[m][0][2 * half + 1]);
      FLASHTILE_UNROLL
      for (int n = 1; n < s.kColBlocks; ++n) {
        top[m][half] = fmaxf(top[m][half], fmaxf(s.d[m][n][2 * half], s.d[m][n][2 * half + 1]));
      }
      exceeds |= fmaf(top[m][half], scale_log2, offset[m][half]) > slack;
    });
    const bool rescales = __any_sync(0xffffffffu, exceeds);
    if (rescales) rescale(top, s, rescale_row);
    return rescales;
  }

  // scores -> probabilities, for the two n8 blocks of columns 16 * k.
  template <int kKeys>
  FLASHTILE_DEVICE void exponentiate(Accumulator<kRows, kKeys>& s, int k) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int n = 2 * k; n < 2 * k + 2; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          s.d[m][n][i] = ptx::ex2(fmaf(s.d[m][n][i], scale_log2, offset[m][i / 2]));
          sum[m][i / 2] += s.d[m][n][i];
        }
      }
    }
  }

  // After the last block: the sum over the whole row, in all four lanes.
  FLASHTILE_DEVICE float row_sum(int m, int half) const {
    float x = sum[m][half];
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // What the row's exponentials sum up to. Where the warp shifts, only the lane that stored the
  // shift (lane % 4 == 0) may ask without a __syncwarp.
  FLASHTILE_DEVICE LogSum log_sum(int m, int half, float whole_sum) const {
    const float near = __log2f(whole_sum) - offset[m][half];
    return {is_shifted() ? ptx::lds_f32(shift_address(m, half)) : 0.0f, near};
  }
  // Natural logarithm of the sum of exp(scale * S).
  FLASHTILE_DEVICE float logsumexp(int m, int half, float whole_sum) const {
    return log_sum(m, half, whole_sum).value(scale_log2) * kLn2;
  }

 private:
  FLASHTILE_DEVICE bool is_shifted() const { return slack != kSlack; }

  template <int kKeys, class RescaleRow>
  FLASHTILE_DEVICE void rescale(const float (&top)[kRowBlocks][2], Accumulator<kRows, kKeys>& s,
                                const RescaleRow& rescale_row) {
    if (!is_shifted()) begin_shifting(top);
    for_each_row<kRows>([&](int m, int half) {
      float row_top = fmaxf(top[m][half], __shfl_xor_sync(0xffffffffu, top[m][half], 1));
      row_top = fmaxf(row_top, __shfl_xor_sync(0xffffffffu, row_top, 2));
      const float before = offset[m][half];
      float exponent;  // of the factor
      if (is_shifted()) {
        exponent = raise_shifted(row_top, s, m, half);
      } else {
        offset[m][half] = fminf(before, -row_top * scale_log2);
        exponent = offset[m][half] - before;
      }
      const float factor = ptx::ex2(exponent);
      sum[m][half] *= factor;
      rescale_row(m, half, factor);
    });
  }

  // Starts with shifts of 0 if some new maximum of the warp is too large for an offset.
  FLASHTILE_DEVICE void begin_shifting(const float (&top)[kRowBlocks][2]) {
    bool large = false;
    for_each_row<kRows>([&](int m, int half) {
      large |= fmaf(top[m][half], scale_log2, offset[m][half]) > 0.0f &&
               fabsf(top[m][half] * scale_log2) > kLargestOffset;
    });
    if (!__any_sync(0xffffffffu, large)) return;
    for_each_row<kRows>([&](int m, int half) { store_shift(m, half, 0.0f); });
    slack = negative_infinity();
  }

  // Raises shift and offset of a row to the maximum `row_top`, and subtracts the shift from its
  // scores. Returns the exponent of the factor that brings old sums to the new ones.
  template <int kKeys>
  FLASHTILE_DEVICE float raise_shifted(float row_top, Accumulator<kRows, kKeys>& s, int m,
                                       int half) {
    __syncwarp();  // the shift was stored by one lane of the row
    const float before = ptx::lds_f32(shift_address(m, half));
    float shift = before, exponent = 0.0f;
    if (fmaf(row_top - before, scale_log2, offset[m][half]) > 0.0f) {
      const bool large = fabsf(row_top * scale_log2) > kLargestOffset;
      const float raised = large ? 0.0f : -row_top * scale_log2;
      shift = large ? row_top : 0.0f;
      exponent = fmaf(before - shift, scale_log2, raised - offset[m][half]);
      offset[m][half] = raised;
    }
    __syncwarp();  // all lanes of the row have read it
    store_shift(m, half, shift);
    FLASHTILE_UNROLL
    for (int n = 0; n < s.kColBlocks; ++n) {
      s.d[m][n][2 * half] -= shift;
      s.d[m][n][2 * half + 1] -= shift;
    }
    return exponent;
  }

  FLASHTILE_DEVICE uint32_t shift_address(int m, int half) const {
    return shifts + 4 * accumulator_row(ptx::thread_index() % 32, m, 2 * half);
  }
  FLASHTILE_DEVICE void store_shift(int m, int half, float shift) const {
    if (ptx::thread_index() % 4 == 0) ptx::sts_f32(shift_address(m, half), shift);
  }
};

// A scale that is positive, normal and keeps the order of |scale| * scores. scale = 0 becomes
// 1e-38: every finite score then counts as 0, and a masked one as -inf (0 * -inf would be NaN).
FLASHTILE_HOST_DEVICE float positive_scale_log2(float scale) {
  const float magnitude = (scale < 0.0f ? -scale : scale) * kLog2e;
  return magnitude > 1.2e-38f ? magnitude : 1.2e-38f;
}

}  // namespace flashtile
