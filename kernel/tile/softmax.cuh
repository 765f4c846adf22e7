// Online softmax (FlashAttention-2, Algorithm 1) in base 2: P = 2^(scale_log2 * S - scale_log2 *
// max).
//
// O and the row sum are rescaled to a new maximum only when some score exceeds the old one by more
// than 2^kSlack: until then P <= 2^kSlack, which fp32 and the 16-bit formats hold as exactly as 1,
// and the final division makes it good. Rows start with a maximum of -1e30 / scale_log2, below
// every score, so no value is special: -inf scores give P = 0, a NaN or +inf score makes its row
// NaN.
#pragma once

#include "accumulator.cuh"
#include "constants.cuh"

namespace flashtile {

inline constexpr float kSlack = 8.0f;

// State of one warp's rows: indices [row block][half], rows 16 m + 8 half + lane / 4.
template <int kRows>
struct OnlineSoftmax {
  static constexpr int kRowBlocks = kRows / 16;

  float scale_log2;             // > 0
  float offset[kRowBlocks][2];  // -max * scale_log2, equal in the four lanes of a row
  float sum[kRowBlocks][2];     // of P, over this lane's columns

  FLASHTILE_DEVICE explicit OnlineSoftmax(float positive_scale_log2)
      : scale_log2(positive_scale_log2) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        offset[m][half] = 1e30f;
        sum[m][half] = 0.0f;
      }
    }
  }

  // Makes room for the scores s: raises the maximum and rescales o where it is needed.
  template <int kKeys, int kCols>
  FLASHTILE_DEVICE void raise_maximum(const Accumulator<kRows, kKeys>& s,
                                      Accumulator<kRows, kCols>& o) {
    float top[kRowBlocks][2];  // of this lane's columns
    bool exceeds = false;
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        top[m][half] = fmaxf(s.d[m][0][2 * half], s.d[m][0][2 * half + 1]);
        FLASHTILE_UNROLL
        for (int n = 1; n < s.kColBlocks; ++n) {
          top[m][half] = fmaxf(top[m][half], fmaxf(s.d[m][n][2 * half], s.d[m][n][2 * half + 1]));
        }
        exceeds |= fmaf(top[m][half], scale_log2, offset[m][half]) > kSlack;
      }
    }
    if (__any_sync(0xffffffffu, exceeds)) rescale(top, o);
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

  // Natural logarithm of the sum of exp(scale * S).
  FLASHTILE_DEVICE float logsumexp(int m, int half, float whole_sum) const {
    return (__log2f(whole_sum) - offset[m][half]) * kLn2;
  }

 private:
  template <int kCols>
  FLASHTILE_DEVICE void rescale(const float (&top)[kRowBlocks][2], Accumulator<kRows, kCols>& o) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float row_top = fmaxf(top[m][half], __shfl_xor_sync(0xffffffffu, top[m][half], 1));
        row_top = fmaxf(row_top, __shfl_xor_sync(0xffffffffu, row_top, 2));
        const float raised = fminf(offset[m][half], -row_top * scale_log2);
        const float factor = ptx::ex2(raised - offset[m][half]);
        offset[m][half] = raised;
        sum[m][half] *= factor;
        FLASHTILE_UNROLL
        for (int n = 0; n < o.kColBlocks; ++n) {
          o.d[m][n][2 * half] *= factor;
          o.d[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }
};

// A scale that is positive, normal and keeps the order of |scale| * scores. scale = 0 becomes
// 1e-38: every finite score then counts as 0, and a masked one as -inf (0 * -inf would be NaN).
FLASHTILE_HOST_DEVICE float positive_scale_log2(float scale) {
  const float magnitude = (scale < 0.0f ? -scale : scale) * kLog2e;
  return magnitude > 1.2e-38f ? magnitude : 1.2e-38f;
}

}  // namespace flashtile
