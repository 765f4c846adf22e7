// What stands between Q K^T and P V in the backward, whose tiles of scores are transposed: rows are
// keys, columns are queries.
#pragma once

#include "tile/scores.cuh"

namespace flashtile {

// What the walk over the queries of one head notes in shared memory: see ScoreNotes.
struct TransposedNotes {
  static constexpr int kRandom = 0;  // RandomWords
  static constexpr int kBias = 16;   // two addresses: of query 0, the block's first key
  static constexpr int kMask = 32;   // an address; of bits, of the row's first byte
  static constexpr int kScale = 40;  // the query_scale's, of query 0
  static constexpr int kPlace = 48;  // Place
  static constexpr int kBytes = 64;

  struct Place {
    float slope_log2;
    int shift;
    int key;       // the block's first one
    int seqlen_q;  // queries of the sequence
  };

  // By one thread; a barrier must follow.
  static FLASHTILE_DEVICE void write(const Problem& problem, const ScoreParams& p,
                                     const RowBlock& block, int head, uint32_t notes) {
    const Sequence& s = block.sequence;
    const auto address = [&](const ScoreView& view, int64_t row, int64_t key) {
      return static_cast<const char*>(view.data) +
             (s.index * view.stride_batch + head * view.stride_head + row * view.stride_q +
              key * view.stride_k) *
                 number_bytes(view);
    };
    FLASHTILE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (p.of.bias[i].exists())
        store_address(notes + kBias + 8 * i, address(p.of.bias[i], 0, block.row0));
    }
    if (p.of.mask.exists()) {
      const bool bits = p.of.mask.dtype == Dtype::kBits;
      store_address(notes + kMask, address(p.of.mask, 0, bits ? 0 : block.row0));
    }
    if (p.of.query_scale.exists())
      store_address(notes + kScale, address(p.of.query_scale, s.row_q, 0));
    const ScoreView& slopes = p.of.alibi_slopes;
    const float slope =
        slopes.exists()
            ? number_of(slopes, s.index * slopes.stride_batch + head * slopes.stride_head)
            : 0.0f;
    const int shift = problem.band.top_left ? 0 : s.seqlen_k - s.seqlen_q;
    const Place place = {slope * kLog2e, shift, block.row0, s.seqlen_q};
    ptx::sts_u32x4(notes + kPlace, __builtin_bit_cast(uint4, place));
    if (p.of.dropout.exists()) {
      const RandomWords words = dropout_words(p.of.dropout, s.index, head);
      ptx::sts_u32x4(notes + kRandom, __builtin_bit_cast(uint4, words));
    }
  }
};

// A warp's tile.
struct TransposedTile {
  uint32_t notes;
  int key;    // the warp's first one, in the block of keys
  int query;  // the first one, in the sequence

  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE TransposedNotes::Place place() const {
    return __builtin_bit_cast(TransposedNotes::Place,
                              ptx::lds_u32x4(notes + TransposedNotes::kPlace));
  }
};

// Under a cap alone, of S and the LSE: returns P, and leaves in x what makes dS of dP - delta, P
// times the derivative of the cap.
FLASHTILE_DEVICE float weigh_capped(float& x, float lse, const ScoreParams& p) {
  const float t = capped(x * p.factor, 1.0f, 1.0f);
  const float probability = ptx::ex2(t * p.cap_log2 - lse);
  x = probability * fmaf(-t, t, 1.0f);
  return probability;
}

// A lane's elements of a tile, between the products: the slopes of the cap, and what dropout keeps.
template <int kKeys, int kQueries>
struct TransposedElements {
  static constexpr int kRowBlocks = kKeys / 16, kColBlocks = kQueries / 8;
  using Scores = Accumulator<kKeys, kQueries>;
  uint32_t slopes[kRowBlocks][kColBlocks][2];              // pairs of fp16, in [0, 1]
  uint32_t kept[(kRowBlocks * kColBlocks * 4 + 31) / 32];  // a bit for each

  // S^T -> logits; hidden by the mask: -inf.
  FLASHTILE_DEVICE void to_logits(Scores& s, const ScoreParams& p, const TransposedTile& at) {
    const TransposedNotes::Place place = at.place();
    if (p.scales) {
      if (p.of.query_scale.exists()) scale_queries(s, 0, p.of.query_scale, at, place.seqlen_q);
      if (p.of.softcap != 0) {
        cap(s, p);
      } else {
        for_each(s, [&](float& x, int, int, int) { x *= p.factor; });
      }
      if (p.of.alibi_slopes.exists()) add_slopes(s, place, at);
      FLASHTILE_ROLL
      for (int i = 0; i < 2; ++i) {
        const ScoreView& bias = p.of.bias[i];
        if (!bias.exists()) continue;
        const char* const first = load_address(at.notes + TransposedNotes::kBias + 8 * i);
        add_bias(s, bias, block_of(bias, first, place, at));
      }
    }
    if (p.of.mask.exists()) hide(s, p.of.mask, place, at);
  }

  // Which elements are kept. Of the two calls of Philox that a lane needs for 16 x 16 elements its
  // neighbour, four lanes on, needs the other halves: each makes one.
  // The factor of those that are is one of P from here on, and dP - delta is that much smaller.
  FLASHTILE_DEVICE void draw(Scores& p, const ScoreParams& params, const TransposedTile& at) {
    const Dropout& dropout = params.of.dropout;
    if (!dropout.exists()) return;
    for_each(p, [&](float& x, int, int, int) { x *= params.kept_factor; });
    const auto of_head =
        __builtin_bit_cast(RandomWords, ptx::lds_u32x4(at.notes + TransposedNotes::kRandom));
    const int key = at.place().key + at.key, lane = at.lane();
    const bool is_odd = lane / 4 % 2 != 0;  // the lane's keys are
    FLASHTILE_UNROLL
    for (uint32_t& bits : kept) bits = 0;
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kColBlocks; n += 2) {
        const RandomWords words = block_words(of_head, at.query + 8 * n, key + 16 * m,
                                              lane % 4 * 2 + (is_odd ? 1 : 0), lane / 8);
        uint32_t of_query[2][2];  // [query % 2][key half]
        FLASHTILE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t even = words.of[half], odd = words.of[2 + half];
          const uint32_t other = __shfl_xor_sync(0xffffffffu, is_odd ? even : odd, 4);
          of_query[0][half] = is_odd ? other : even;
          of_query[1][half] = is_odd ? odd : other;
        }
        FLASHTILE_UNROLL
        for (int e = 0; e < 2; ++e) {
          FLASHTILE_UNROLL
          for (int i = 0; i < 4; ++i) {
            const uint32_t word = of_query[i % 2][i / 2];
            const bool is_kept = (e == 0 ? word & 0xffffu : word >> 16) >= dropout.threshold;
            const int bit = (m * kColBlocks + n + e) * 4 + i;
            kept[bit / 32] |= is_kept ? 1u << (bit % 32) : 0u;
          }
        }
      }
    }
  }
  FLASHTILE_DEVICE bool is_kept(int m, int n, int i) const {
    const int bit = (m * kColBlocks + n) * 4 + i;
    return (kept[bit / 32] >> (bit % 32) & 1) != 0;
  }

  // Ones where a pair of keys or queries of a register operand is kept: elements i and i + 1.
  FLASHTILE_DEVICE uint32_t kept_pair(int m, int n, int i) const {
    return (is_kept(m, n, i) ? 0xffffu : 0u) | (is_kept(m, n, i + 1) ? 0xffff0000u : 0u);
  }

  // P as an operand, without what is dropped.
  template <class T, class Packed>
  FLASHTILE_DEVICE void pack_kept(Packed& packed, const Scores& p, const Dropout& dropout) const {
    packed.template pack<T>(p);
    if (!dropout.exists()) return;
    FLASHTILE_UNROLL
    for (int k = 0; k < kQueries / 16; ++k) {
      FLASHTILE_UNROLL
      for (int m = 0; m < kRowBlocks; ++m) {
        FLASHTILE_UNROLL
        for (int a = 0; a < 4; ++a) {
          packed.x[k][m][a] &= kept_pair(m, 2 * k + a / 2, a % 2 * 2);
        }
      }
    }
  }

  // dP - delta of what is dropped is what the product began with: -delta. `ds`: n8 blocks of
  // queries from `first` on.
  template <int kSome, class Start>
  FLASHTILE_DEVICE void keep_start(Accumulator<kKeys, kSome>& ds, int first, const Dropout& dropout,
                                   const Start& start) const {
    if (!dropout.exists()) return;
    FLASHTILE_UNROLL
    for (int n = 0; n < kSome / 8; ++n) {
      const float4 x = start(n);
      FLASHTILE_UNROLL
      for (int m = 0; m < kRowBlocks; ++m) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!is_kept(m, first + n, i)) ds.d[m][n][i] = i % 2 == 0 ? x.x : x.y;
        }
      }
    }
  }

  // P -> P times the derivative of the cap: what makes dS of dP - delta.
  FLASHTILE_DEVICE void slope(Scores& p, const ScoreParams& params) const {
    if (params.of.softcap == 0) return;
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kColBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float2 slope = unpack<__half>(slopes[m][n][half]);
          p.d[m][n][2 * half] *= slope.x;
          p.d[m][n][2 * half + 1] *= slope.y;
        }
      }
    }
  }

  // dS of n8 blocks of queries from `first` on, times the query_scale.
  template <int kSome>
  static FLASHTILE_DEVICE void scale(Accumulator<kKeys, kSome>& ds, int first, const ScoreParams& p,
                                     const TransposedTile& at) {
    if (p.of.query_scale.exists())
      scale_queries(ds, first, p.of.query_scale, at, at.place().seqlen_q);
  }

 private:
  // Columns times the query_scale of their queries.
  template <int kSome>
  static FLASHTILE_DEVICE void scale_queries(Accumulator<kKeys, kSome>& s, int first,
                                             const ScoreView& scales, const TransposedTile& at,
                                             int seqlen_q) {
    const char* const of_sequence = load_address(at.notes + TransposedNotes::kScale);
    FLASHTILE_UNROLL
    for (int n = 0; n < kSome / 8; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int query = at.query + 8 * (first + n) + at.lane() % 4 * 2 + i;
        const float scale =
            ptx::ldg_f32_or_zero(of_sequence + 4 * query * scales.stride_q, query < seqlen_q);
        FLASHTILE_UNROLL
        for (int m = 0; m < kRowBlocks; ++m) {
          s.d[m][n][i] *= scale;
          s.d[m][n][i + 2] *= scale;
        }
      }
    }
  }

  // With t = tanh: logits cap t, slopes 1 - t^2.
  FLASHTILE_DEVICE void cap(Scores& s, const ScoreParams& p) {
    FLASHTILE_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      FLASHTILE_UNROLL
      for (int n = 0; n < kColBlocks; ++n) {
        float slope[4];
        FLASHTILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float t = capped(s.d[m][n][i] * p.factor, 1.0f, 1.0f);
          slope[i] = fmaf(-t, t, 1.0f);
          s.d[m][n][i] = t * p.cap_log2;
        }
        slopes[m][n][0] = ptx::pack<__half>(slope[0], slope[1]);
        slopes[m][n][1] = ptx::pack<__half>(slope[2], slope[3]);
      }
    }
  }

  static FLASHTILE_DEVICE void add_slopes(Scores& s, const TransposedNotes::Place& place,
                                          const TransposedTile& at) {
    const int first =
        at.query + at.lane() % 4 * 2 + place.shift - place.key - at.key - at.lane() / 4;
    for_each_row<kKeys>([&](int m, int half) {
      const auto distance = static_cast<float>(first - 16 * m - 8 * half);
      FLASHTILE_UNROLL
      for (int n = 0; n < kColBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& x = s.d[m][n][2 * half + i];
          x = fmaf(-place.slope_log2, fabsf(distance + static_cast<float>(8 * n + i)), x);
        }
      }
    });
  }

  // `first`: the address of query 0 and the block's first key. Queries behind the sequence's last
  // one do not exist, even where the tensor has some: their probabilities must be numbers.
  static FLASHTILE_DEVICE ScoreBlock<EvenRows> block_of(const ScoreView& view, const char* first,
                                                        const TransposedNotes::Place& place,
                                                        const TransposedTile& at) {
    const int64_t bytes = number_bytes(view);
    const int64_t row_bytes = view.stride_k * bytes, column_bytes = view.stride_q * bytes;
    const int lane_key = at.key + at.lane() / 4, lane_query = at.query + at.lane() % 4 * 2;
    const int keys = static_cast<int>(view.seqlen_k) - place.key - at.key;
    const int queries = min(static_cast<int>(view.seqlen_q), place.seqlen_q) - at.query;
    return {
        {first + lane_key * row_bytes + lane_query * column_bytes, row_bytes, keys - at.lane() / 4},
        column_bytes,
        queries - at.lane() % 4 * 2,
        keys >= kKeys && queries >= kQueries};
  }

  static FLASHTILE_DEVICE void hide(Scores& s, const ScoreView& mask,
                                    const TransposedNotes::Place& place, const TransposedTile& at) {
    const char* const first = load_address(at.notes + TransposedNotes::kMask);
    if (mask.dtype == Dtype::kBool) return hide_by_bytes(s, block_of(mask, first, place, at));
    const int queries = min(static_cast<int>(mask.seqlen_q), place.seqlen_q);
    FLASHTILE_UNROLL
    for (int n = 0; n < kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int query = at.query + 8 * n + at.lane() % 4 * 2 + i;
        const uint32_t word =
            load_bits(first + query * mask.stride_q, place.key + at.key + at.lane() / 4,
                      query < queries ? static_cast<int>(mask.seqlen_k) : 0);
        FLASHTILE_UNROLL
        for (int m = 0; m < kRowBlocks; ++m) {
          FLASHTILE_UNROLL
          for (int half = 0; half < 2; ++half) {
            if ((word >> (16 * m + 8 * half) & 1) == 0)
              s.d[m][n][2 * half + i] = negative_infinity();
          }
        }
      }
    }
  }
};

}  // namespace flashtile
