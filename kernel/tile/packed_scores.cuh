// Scores of packed rows (decode/plan.cuh): heads of a query, then those of the next one, so each of
// a lane's two rows has a head, a slope and addresses of its own.
#pragma once

#include "scores.cuh"

namespace flashtile {

// Where a lane's two rows stand, and the largest logits that they have met.
struct PackedPlace {
  int batch, first_key, shift, row_q;  // of the sequence
  int query[2], head[2];               // query -1: a row that is not in use
  float top[2];

  // `rows` packed rows of the heads from `first_head` on, `group` to a query; the warp's begin at
  // `row0`.
  FLASHTILE_DEVICE PackedPlace(const Sequence& sequence, int shift, int first_head, int group,
                               int row0, int rows)
      : batch(static_cast<int>(sequence.index)),
        first_key(static_cast<int>(sequence.row_k)),
        shift(shift),
        row_q(static_cast<int>(sequence.row_q)) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + ptx::thread_index() % 32 / 4 + 8 * half;
      query[half] = row < rows ? row / group : -1;
      head[half] = first_head + row % group;
      top[half] = negative_infinity();
    }
  }
};

// The lane's two rows of a bias or a mask.
struct PackedRows {
  const char* address[2];
  bool has[2];

  FLASHTILE_DEVICE PackedRows(const ScoreView& view, const PackedPlace& at, int64_t key) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      address[half] = static_cast<const char*>(view.data) +
                      (at.batch * view.stride_batch + at.head[half] * view.stride_head +
                       at.query[half] * view.stride_q + key * view.stride_k) *
                          number_bytes(view);
      has[half] = at.query[half] >= 0 && at.query[half] < view.seqlen_q;
    }
  }
  FLASHTILE_DEVICE const char* first(int r) const { return r == 0 ? address[0] : address[1]; }
  FLASHTILE_DEVICE bool exists(int r) const { return r == 0 ? has[0] : has[1]; }
  FLASHTILE_DEVICE bool are_multiples_of(int bytes) const {
    return has[0] && has[1] &&
           (static_cast<uint32_t>(reinterpret_cast<uint64_t>(address[0])) |
            static_cast<uint32_t>(reinterpret_cast<uint64_t>(address[1]))) %
                   static_cast<uint32_t>(bytes) ==
               0;
  }
};

struct PackedLogits {
  // S -> logits; hidden by the mask: -inf. `key`: the tile's first one.
  template <int kKeys>
  static FLASHTILE_DEVICE void to_logits(Accumulator<16, kKeys>& s, const ScoreParams& p,
                                         const PackedPlace& at, int key) {
    const int column = ptx::thread_index() % 4 * 2;
    if (p.scales) {
      FLASHTILE_UNROLL
      for (int half = 0; half < 2; ++half) scale_row(s, p, at, half, key + column);
      FLASHTILE_ROLL
      for (int i = 0; i < 2; ++i) {
        if (p.of.bias[i].exists())
          add_bias(s, p.of.bias[i], block_of<kKeys>(p.of.bias[i], at, key));
      }
    }
    const ScoreView& mask = p.of.mask;
    if (!mask.exists()) return;
    if (mask.dtype == Dtype::kBool) return hide_by_bytes(s, block_of<kKeys>(mask, at, key));
    hide_by_bits(s, PackedRows(mask, at, 0), at.first_key + key + column,
                 static_cast<int>(mask.seqlen_k));
  }

  // Hidden logits are -inf.
  template <int kKeys>
  static FLASHTILE_DEVICE void keep_tops(const Accumulator<16, kKeys>& s, PackedPlace& at) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n) {
        at.top[half] = fmaxf(at.top[half], fmaxf(s.d[0][n][2 * half], s.d[0][n][2 * half + 1]));
      }
    }
  }
  static FLASHTILE_DEVICE void raise_max_logit(const ScoreView& max_logit, const PackedPlace& at) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = at.top[half];
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      if (ptx::thread_index() % 4 == 0 && at.query[half] >= 0)
        raise_logit(static_cast<float*>(max_logit.data) + at.head[half], top * kLn2);
    }
  }

 private:
  template <int kKeys>
  static FLASHTILE_DEVICE void scale_row(Accumulator<16, kKeys>& s, const ScoreParams& p,
                                         const PackedPlace& at, int half, int key) {
    const ScoreView &scales = p.of.query_scale, &slopes = p.of.alibi_slopes;
    const bool is_capped = p.of.softcap != 0, in_use = at.query[half] >= 0;
    float factor = p.factor, slope = 0.0f;
    if (scales.exists()) {
      factor *= number_of(
          scales,
          at.batch * scales.stride_batch + int64_t{at.row_q + at.query[half]} * scales.stride_q,
          in_use);
    }
    if (slopes.exists()) {
      slope = number_of(slopes, at.batch * slopes.stride_batch + at.head[half] * slopes.stride_head,
                        in_use) *
              kLog2e;
    }
    const auto distance = static_cast<float>(at.query[half] + at.shift - key);
    FLASHTILE_UNROLL
    for (int n = 0; n < s.kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 2; ++i) {
        float& x = s.d[0][n][2 * half + i];
        x = is_capped ? capped(x * factor, p.cap_log2, p.cap_log2) : x * factor;
        x = fmaf(-slope, fabsf(distance - static_cast<float>(8 * n + i)), x);
      }
    }
  }

  template <int kKeys>
  static FLASHTILE_DEVICE ScoreBlock<PackedRows> block_of(const ScoreView& view,
                                                          const PackedPlace& at, int key) {
    const int lane_key = at.first_key + key + ptx::thread_index() % 4 * 2;
    const int columns = static_cast<int>(view.seqlen_k) - at.first_key - key;
    return {PackedRows(view, at, lane_key), view.stride_k * number_bytes(view),
            static_cast<int>(view.seqlen_k) - lane_key, columns >= kKeys};
  }
};

}  // namespace flashtile
