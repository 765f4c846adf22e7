// What stands between Q K^T and P V, a policy of every main loop: flashtile.h, flashtile_scores,
// says what and in which order.
//
// PlainScores has nothing: the hooks are not compiled, and the scale is the softmax's.
// ModifiedScores decides by run-time options, each a branch of a warp's whole tile. Its logits are
// base 2, so its softmax has scale_log2 = 1; where nothing changes the logits (a mask or dropout
// alone) they stay scores, and the softmax scales them as ever. A scale of 0 or below would show
// what a mask hides, as -inf: then they are scaled first.
//
// A main loop has no registers for where biases lie: one thread works it out once a block of
// queries and notes it in shared memory (ScoreNotes).
#pragma once

#include <type_traits>

#include "../config.cuh"
#include "../launch.cuh"
#include "../ptx/order.cuh"
#include "dropout.cuh"
#include "score_numbers.cuh"
#include "softmax.cuh"
#include "work.cuh"

namespace flashtile {

// The options as kernels read them, with the numbers that the host works out.
struct ScoreParams {
  Scores of;
  bool scales;        // S -> logits; else the softmax scales
  bool cap_alone;     // nothing else changes logits, hides keys or drops
  bool changes_dp;    // backward: dP - delta is not what the product leaves
  float factor;       // on S: to logits, or to what the cap's exponential takes
  float cap_log2;     // softcap * log2(e)
  float kept_factor;  // of what dropout keeps; 1 where it keeps nothing, so that 1 / it exists
};

inline ScoreParams score_params(const Problem& problem, const Scores& scores) {
  const bool is_capped = scores.softcap != 0;
  const double log2e = 1.442695040888963407;
  ScoreParams p{};
  p.of = scores;
  p.scales = is_capped || scores.bias[0].exists() || scores.bias[1].exists() ||
             scores.alibi_slopes.exists() || scores.query_scale.exists() ||
             scores.max_logit.exists() || (scores.mask.exists() && !(problem.softmax_scale > 0));
  p.cap_alone = is_capped && !scores.hides_keys() && !scores.alibi_slopes.exists() &&
                !scores.query_scale.exists() && !scores.dropout.exists();
  p.changes_dp = scores.query_scale.exists() || scores.dropout.exists();
  p.factor =
      static_cast<float>(problem.softmax_scale * log2e * (is_capped ? 2 / scores.softcap : 1.0));
  p.cap_log2 = static_cast<float>(scores.softcap * log2e);
  const double kept = scores.dropout.exists() ? scores.dropout.scale : 1.0;
  p.kept_factor = kept > 0 ? static_cast<float>(kept) : 1.0f;
  return p;
}

struct PlainScores {
  static constexpr bool kModifies = false;
  static constexpr Variant kVariant = Variant::kPlain;
  template <class Params>
  using WithScores = Params;
};

// The notes of a block of queries of one head, behind one another in shared memory.
struct ScoreNotes {
  static constexpr int kRandom = 0;  // RandomWords
  static constexpr int kBias = 16;   // two addresses: of the block's first query, key 0
  static constexpr int kMask = 32;   // an address
  static constexpr int kScale = 40;  // the query_scale's
  static constexpr int kPlace = 48;  // slope * log2(e), as it stands in Place
  static constexpr int kRows = 64;   // queries in use, from the first one on
  static constexpr int kTops = 80;   // the largest logit of every warp
  static constexpr int kMostWarps = 8;
  static constexpr int kBytes = kTops + 4 * kMostWarps;

  struct Place {
    float slope_log2;
    int distance;   // from key 0 to the first query's own position
    int query;      // the first one
    int first_key;  // what stands before key 0: the left padding of a cache
  };
};

FLASHTILE_DEVICE void store_address(uint32_t to, const char* address) {
  const auto bits = reinterpret_cast<uint64_t>(address);
  ptx::sts_u32(to, static_cast<uint32_t>(bits));
  ptx::sts_u32(to + 4, static_cast<uint32_t>(bits >> 32));
}
FLASHTILE_DEVICE const char* load_address(uint32_t from) {
  const uint64_t low = ptx::lds_u32(from), high = ptx::lds_u32(from + 4);
  return reinterpret_cast<const char*>(high << 32 | low);
}

// Rows of a warp's tile that lie one stride apart.
struct EvenRows {
  const char* lane_first;
  int64_t row_bytes;
  int count;  // of the tensor, from the lane's first one on

  FLASHTILE_DEVICE const char* first(int r) const { return lane_first + 8 * r * row_bytes; }
  FLASHTILE_DEVICE bool exists(int r) const { return 8 * r < count; }
  FLASHTILE_DEVICE bool are_multiples_of(int bytes) const {
    return (static_cast<uint32_t>(reinterpret_cast<uint64_t>(lane_first)) |
            static_cast<uint32_t>(row_bytes)) %
               static_cast<uint32_t>(bytes) ==
           0;
  }
};

// A warp's tile of scores: rows are queries of one head.
struct ScoreTile {
  uint32_t notes;
  int row;  // the warp's first one in the block of queries

  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE ScoreNotes::Place place() const {
    return __builtin_bit_cast(ScoreNotes::Place, ptx::lds_u32x4(notes + ScoreNotes::kPlace));
  }
  // Of those in use, from the lane's first one on.
  FLASHTILE_DEVICE int lane_rows() const {
    return static_cast<int>(ptx::lds_u32(notes + ScoreNotes::kRows)) - row - lane() / 4;
  }
};

// Keeps the larger one at an address that began as -inf. By the bits: those of numbers from 0 on
// rise as signed integers, those below 0 fall as unsigned ones, and each test leaves the other kind
// alone.
FLASHTILE_DEVICE void raise_logit(float* to, float logit) {
  if (logit == negative_infinity()) return;
  if (logit >= 0.0f) {
    ptx::red_max(reinterpret_cast<int*>(to), __float_as_int(fabsf(logit)));  // -0, too, is 0
  } else {
    ptx::red_min(reinterpret_cast<uint32_t*>(to), __float_as_uint(logit));
  }
}

// cap tanh(u) = most - 2 cap / (1 + e^(2 u)), most = cap, from 2 u log2(e): tanh.approx is not
// exact enough.
FLASHTILE_DEVICE float capped(float exponent, float cap, float most) {
  return fmaf(-2.0f * cap, ptx::rcp(1.0f + ptx::ex2(exponent)), most);
}

struct ModifiedScores {
  static constexpr bool kModifies = true;
  static constexpr Variant kVariant = Variant::kModified;
  template <class Params>
  struct WithScores : Params {
    ScoreParams scores;
  };

  // By one thread, for the block of queries `work`; a barrier must follow.
  static FLASHTILE_DEVICE void note(const Problem& problem, const ScoreParams& p,
                                    const RowBlock& work, uint32_t notes) {
    const Sequence& s = work.sequence;
    const int shift = problem.band.top_left ? 0 : s.seqlen_k - s.seqlen_q;
    const int first_key = problem.cache.exists() ? static_cast<int>(s.row_k) : 0;
    const auto address = [&](const ScoreView& view, int64_t row, int64_t key) {
      return static_cast<const char*>(view.data) +
             (s.index * view.stride_batch + work.head * view.stride_head + row * view.stride_q +
              key * view.stride_k) *
                 number_bytes(view);
    };
    FLASHTILE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (p.of.bias[i].exists())
        store_address(notes + ScoreNotes::kBias + 8 * i,
                      address(p.of.bias[i], work.row0, first_key));
    }
    if (p.of.mask.exists()) {
      const bool bits = p.of.mask.dtype == Dtype::kBits;
      store_address(notes + ScoreNotes::kMask, address(p.of.mask, work.row0, bits ? 0 : first_key));
    }
    if (p.of.query_scale.exists()) {
      store_address(notes + ScoreNotes::kScale, address(p.of.query_scale, s.row_q + work.row0, 0));
    }
    const float slope =
        p.of.alibi_slopes.exists()
            ? number_of(p.of.alibi_slopes, s.index * p.of.alibi_slopes.stride_batch +
                                               work.head * p.of.alibi_slopes.stride_head)
            : 0.0f;
    const ScoreNotes::Place place = {slope * kLog2e, work.row0 + shift, work.row0, first_key};
    ptx::sts_u32x4(notes + ScoreNotes::kPlace, __builtin_bit_cast(uint4, place));
    ptx::sts_u32(notes + ScoreNotes::kRows, static_cast<uint32_t>(work.rows));
    if (p.of.dropout.exists()) {
      const RandomWords words = dropout_words(p.of.dropout, s.index, work.head);
      ptx::sts_u32x4(notes + ScoreNotes::kRandom, __builtin_bit_cast(uint4, words));
    }
  }

  // S -> logits; hidden by the mask: -inf. `key`: the tile's first one.
  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void to_logits(Accumulator<kRows, kKeys>& s, const ScoreParams& p,
                                         const ScoreTile& at, int key) {
    const ScoreNotes::Place place = at.place();
    if (p.scales) {
      const Slope<kRows, kKeys> slope(place, at, key);
      scale(s, p, at, slope);
      if (p.of.alibi_slopes.exists()) slope.add_columns(s);
      add_biases(s, p, at, key, kLog2e);
    }
    if (p.of.mask.exists()) hide(s, p.of.mask, place, at, key);
  }

  // s += factor * the biases.
  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void add_biases(Accumulator<kRows, kKeys>& s, const ScoreParams& p,
                                          const ScoreTile& at, int key, float factor) {
    const ScoreNotes::Place place = at.place();
    FLASHTILE_ROLL
    for (int i = 0; i < 2; ++i) {
      const ScoreView& bias = p.of.bias[i];
      if (!bias.exists()) continue;
      const char* const first = load_address(at.notes + ScoreNotes::kBias + 8 * i);
      add_bias(s, bias, block_of<kRows, kKeys>(bias, first, place, at, key), factor);
    }
  }

  // Keeps the largest logit of the warp; hidden ones are -inf.
  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void keep_top(const Accumulator<kRows, kKeys>& s, const ScoreTile& at) {
    float top = negative_infinity();
    const int rows = at.lane_rows();
    for_each_row<kRows>([&](int m, int half) {
      float of_row = negative_infinity();
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n)
        of_row = fmaxf(of_row, fmaxf(s.d[m][n][2 * half], s.d[m][n][2 * half + 1]));
      if (16 * m + 8 * half < rows) top = fmaxf(top, of_row);
    });
    FLASHTILE_UNROLL
    for (int step = 16; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (at.lane() == 0) ptx::sts_f32(top_address(at), fmaxf(top, ptx::lds_f32(top_address(at))));
  }
  static FLASHTILE_DEVICE void clear_top(const ScoreTile& at) {
    if (at.lane() == 0) ptx::sts_f32(top_address(at), negative_infinity());
  }
  static FLASHTILE_DEVICE void raise_max_logit(const ScoreView& max_logit, int head,
                                               const ScoreTile& at) {
    if (at.lane() != 0) return;
    raise_logit(static_cast<float*>(max_logit.data) + head, ptx::lds_f32(top_address(at)) * kLn2);
  }

  // P -> P without what is dropped, in columns 16 * k.
  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void drop(Accumulator<kRows, kKeys>& p, int k, const Dropout& dropout,
                                    const ScoreTile& at, int key) {
    const auto words =
        __builtin_bit_cast(RandomWords, ptx::lds_u32x4(at.notes + ScoreNotes::kRandom));
    const int query = at.place().query + at.row;
    flashtile::drop(p, k, words, dropout.threshold, query, key);
  }

 private:
  // ALiBi. In blocks on one side of the diagonal the distance is linear: a part of the row, which
  // the scaling adds, and one of the column.
  template <int kRows, int kKeys>
  struct Slope {
    float slope;   // by distance
    float column;  // what a column adds to the logit; 0: the diagonal crosses the block
    float row;     // what the distance of a row's first key counts
    int distance;  // from the lane's first key to its first query's own position

    FLASHTILE_DEVICE Slope(const ScoreNotes::Place& place, const ScoreTile& at, int key)
        : slope(place.slope_log2) {
      const int first = place.distance + at.row - key;
      const bool left = first - (kKeys - 1) >= 0, right = first + (kRows - 1) <= 0;
      column = left ? slope : right ? -slope : 0.0f;
      row = -column;
      distance = first + at.lane() / 4 - at.lane() % 4 * 2;
    }
    FLASHTILE_DEVICE float addend(int m, int half) const {
      return row * static_cast<float>(distance + 16 * m + 8 * half);
    }
    FLASHTILE_DEVICE void add_columns(Accumulator<kRows, kKeys>& s) const {
      if (column != 0.0f) {
        for_each(s, [&](float& x, int, int n, int i) {
          x = fmaf(column, static_cast<float>(8 * n + i % 2), x);
        });
      } else {
        for_each_row<kRows>([&](int m, int half) {
          const auto d = static_cast<float>(distance + 16 * m + 8 * half);
          FLASHTILE_UNROLL
          for (int n = 0; n < s.kColBlocks; ++n) {
            FLASHTILE_UNROLL
            for (int i = 0; i < 2; ++i) {
              float& x = s.d[m][n][2 * half + i];
              x = fmaf(-slope, fabsf(d - static_cast<float>(8 * n + i)), x);
            }
          }
        });
      }
    }
  };

  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void scale(Accumulator<kRows, kKeys>& s, const ScoreParams& p,
                                     const ScoreTile& at, const Slope<kRows, kKeys>& slope) {
    const ScoreView& scales = p.of.query_scale;
    const bool is_capped = p.cap_log2 != 0.0f, has_slope = p.of.alibi_slopes.exists();
    const char* first = nullptr;  // of the lane
    int rows = 0;
    if (scales.exists()) {
      const int64_t row = at.row + at.lane() / 4;
      first = load_address(at.notes + ScoreNotes::kScale) + 4 * row * scales.stride_q;
      rows = at.lane_rows();
    }
    for_each_row<kRows>([&](int m, int half) {
      const int row = 16 * m + 8 * half;
      float factor = p.factor;
      if (scales.exists())
        factor *= ptx::ldg_f32_or_zero(first + 4 * row * scales.stride_q, row < rows);
      const float addend = has_slope ? slope.addend(m, half) : 0.0f;
      if (is_capped) {
        const float most = p.cap_log2 + addend;
        each_of_row(s, m, half, [&](float x) { return capped(x * factor, p.cap_log2, most); });
      } else {
        each_of_row(s, m, half, [&](float x) { return fmaf(x, factor, addend); });
      }
    });
  }

  template <int kRows, int kKeys, class F>
  static FLASHTILE_DEVICE void each_of_row(Accumulator<kRows, kKeys>& s, int m, int half,
                                           const F& f) {
    FLASHTILE_UNROLL
    for (int n = 0; n < s.kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) s.d[m][n][i] = f(s.d[m][n][i]);
    }
  }

  // `first`: the address of the block's first query, key 0.
  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE ScoreBlock<EvenRows> block_of(const ScoreView& view, const char* first,
                                                        const ScoreNotes::Place& place,
                                                        const ScoreTile& at, int key) {
    const int64_t bytes = number_bytes(view);
    const int64_t row_bytes = view.stride_q * bytes, column_bytes = view.stride_k * bytes;
    const int lane_row = at.lane() / 4, lane_column = at.lane() % 4 * 2;
    const int rows = static_cast<int>(view.seqlen_q) - place.query - at.row;
    const int columns = static_cast<int>(view.seqlen_k) - place.first_key - key;
    return {{first + (at.row + lane_row) * row_bytes + (key + lane_column) * column_bytes,
             row_bytes, rows - lane_row},
            column_bytes,
            columns - lane_column,
            rows >= kRows && columns >= kKeys};
  }

  template <int kRows, int kKeys>
  static FLASHTILE_DEVICE void hide(Accumulator<kRows, kKeys>& s, const ScoreView& mask,
                                    const ScoreNotes::Place& place, const ScoreTile& at, int key) {
    const char* const first = load_address(at.notes + ScoreNotes::kMask);
    if (mask.dtype == Dtype::kBool)
      return hide_by_bytes(s, block_of<kRows, kKeys>(mask, first, place, at, key));
    const int lane_row = at.row + at.lane() / 4;
    const EvenRows rows = {first + lane_row * mask.stride_q, mask.stride_q,
                           static_cast<int>(mask.seqlen_q) - place.query - lane_row};
    hide_by_bits(s, rows, place.first_key + key + at.lane() % 4 * 2,
                 static_cast<int>(mask.seqlen_k));
  }

  static FLASHTILE_DEVICE uint32_t top_address(const ScoreTile& at) {
    return at.notes + ScoreNotes::kTops + ptx::thread_index() / 32 * 4;
  }
};

template <Variant kVariant>
using ScorePolicyOf = std::conditional_t<kVariant == Variant::kPlain, PlainScores, ModifiedScores>;

// What a kernel is given, from what the plain one is given; both have scale_log2 and negate_q.
template <class Kernel, class Base>
typename Kernel::Params with_scores(const Base& base, const Problem& problem,
                                    const Scores& scores) {
  if constexpr (Kernel::ScorePolicy::kModifies) {
    typename Kernel::Params params{base, score_params(problem, scores)};
    if (params.scores.scales) {
      params.scale_log2 = 1.0f;
      params.negate_q = false;
    }
    return params;
  } else {
    return base;
  }
}

// max_logit before the launch that raises it.
struct MaxLogitParams {
  float* max_logit;
  int heads;
};
template <class Kernel>
struct ClearMaxLogit {
  using Params = MaxLogitParams;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = 0;

  static FLASHTILE_DEVICE void run(const Params& params, char*) {
    const int head = ptx::block_index() * kThreads + ptx::thread_index();
    if (head < params.heads) params.max_logit[head] = negative_infinity();
  }
};
template <class Kernel>
Status clear_max_logit(const Problem& problem, const Scores& scores, CUstream_st* stream) {
  if (!scores.max_logit.exists()) return FLASHTILE_OK;
  using Clear = ClearMaxLogit<Kernel>;
  return launch<Clear>(
      {static_cast<float*>(scores.max_logit.data), static_cast<int>(problem.num_heads)},
      (problem.num_heads + Clear::kThreads - 1) / Clear::kThreads, stream);
}

}  // namespace flashtile
