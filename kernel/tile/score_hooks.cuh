// A policy's hooks (scores.cuh) in a warp's rows of a tile, for the forward's loops. Of PlainScores
// there are none.
//
// Softcap alone, ALiBi alone and biases alone have code of their own. In that of the cap the
// softmax's multiply-add is the cap's last one: cap tanh(u) = 2 cap / (1 + e^(-2 u)) - cap. S
// becomes the quotient, the softmax scales it by 2 cap, and the LSE lacks the cap until the end. In
// that of biases the softmax scales, and a bias is divided by the scale first.
#pragma once

#include <cmath>

#include "scores.cuh"

namespace flashtile {

// What makes logits of scores. A bit each: of comparisons with numbers in a row the compiler makes
// a jump table, of which the report of the machine code finds no loop.
enum class LogitsBy : int32_t { kSoftmax = 0, kCap = 1, kSlope = 2, kBias = 4, kAll = 8 };

struct HookParams : ScoreParams {
  LogitsBy logits_by;
  float bias_factor;  // kBias: 1 / softmax_scale
};

// Whether there are biases and nothing else, and a scale that divides them without an overflow that
// the logits do not have themselves.
inline bool has_bias_alone(const Problem& problem, const Scores& scores) {
  return (scores.bias[0].exists() || scores.bias[1].exists()) && scores.softcap == 0 &&
         !scores.alibi_slopes.exists() && !scores.mask.exists() && !scores.query_scale.exists() &&
         !scores.max_logit.exists() && problem.softmax_scale >= 0x1p-6f;
}

inline HookParams hook_params(const Problem& problem, const Scores& scores, bool divides_bias) {
  HookParams p{score_params(problem, scores), LogitsBy::kAll, 0.0f};
  const bool has_slope = scores.alibi_slopes.exists();
  if (!p.scales && !scores.mask.exists()) {
    p.logits_by = LogitsBy::kSoftmax;
  } else if (divides_bias && has_bias_alone(problem, scores)) {
    p.logits_by = LogitsBy::kBias;
    p.bias_factor = 1.0f / problem.softmax_scale;
    p.scales = false;
  } else if (scores.hides_keys() || scores.query_scale.exists() || scores.max_logit.exists()) {
    return p;
  } else if (has_slope && scores.softcap == 0) {
    p.logits_by = LogitsBy::kSlope;
  } else if (!has_slope && std::isnormal(p.cap_log2) && std::isfinite(2 * p.cap_log2)) {
    p.logits_by = LogitsBy::kCap;
  }
  return p;
}

// kRows: of a warp. kFirstRow: that of the first warp; below 0 where warps before it do not
// compute.
template <class Policy, int kRows, int kFirstRow>
struct ScoreHooks {
  static constexpr bool kExist = false;
  template <class Base>
  using Params = Base;

  template <class Base>
  FLASHTILE_DEVICE ScoreHooks(const Base&, uint32_t) {}
};

template <int kRows, int kFirstRow>
struct ScoreHooks<ModifiedScores, kRows, kFirstRow> {
  static constexpr bool kExist = true;
  template <class Base>
  struct Params : Base {
    HookParams scores;
  };
  // Whether biases alone have code of their own. On sm_90a it would take registers that the loop
  // does not have.
  static constexpr bool kDividesBias = kFirstRow == 0;
  const HookParams& params;
  uint32_t notes;

  template <class Base>
  FLASHTILE_DEVICE ScoreHooks(const Params<Base>& params, uint32_t notes)
      : params(params.scores), notes(notes) {}

  // Kept, the warp's first row would take a register.
  FLASHTILE_DEVICE ScoreTile at() const {
    return {notes, ptx::thread_index() / 32 * kRows + kFirstRow};
  }

  // S -> logits, or what the softmax scales to logits; hidden by the mask: -inf. `key`: the tile's
  // first one.
  template <int kKeys>
  FLASHTILE_DEVICE void to_logits(Accumulator<kRows, kKeys>& s, int key) const {
    if (params.logits_by == LogitsBy::kSoftmax) return;
    if (is(LogitsBy::kCap)) {
      const float factor = -params.factor;
      for_each(s, [&](float& x, int, int, int) { x = ptx::rcp(1.0f + ptx::ex2(x * factor)); });
    } else if (is(LogitsBy::kSlope)) {
      add_slope(s, key);
    } else if (kDividesBias && is(LogitsBy::kBias)) {
      ModifiedScores::add_biases(s, params, at(), key, params.bias_factor);
    } else {
      ModifiedScores::to_logits(s, params, at(), key);
    }
  }
  template <int kKeys>
  FLASHTILE_DEVICE void keep_top(const Accumulator<kRows, kKeys>& s) const {
    if (params.of.max_logit.exists()) ModifiedScores::keep_top(s, at());
  }
  // P -> P without what is dropped: all of it, and columns 16 * step.
  template <int kKeys>
  FLASHTILE_DEVICE void drop(Accumulator<kRows, kKeys>& p, int key) const {
    const Dropout& dropout = params.of.dropout;
    if (!dropout.exists()) return;
    FLASHTILE_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) ModifiedScores::drop(p, step, dropout, at(), key);
  }
  template <int kKeys>
  FLASHTILE_DEVICE void drop_step(Accumulator<kRows, kKeys>& p, int step, int key) const {
    const Dropout& dropout = params.of.dropout;
    if (dropout.exists()) ModifiedScores::drop(p, step, dropout, at(), key);
  }

  // After the last tile: the largest logit, and the offset as the LSE wants it.
  FLASHTILE_DEVICE void finish(OnlineSoftmax<kRows>& softmax, int head) const {
    const ScoreView& max_logit = params.of.max_logit;
    if (max_logit.exists()) ModifiedScores::raise_max_logit(max_logit, head, at());
    if (is(LogitsBy::kCap)) {
      for_each_row<kRows>([&](int m, int half) { softmax.offset[m][half] += params.cap_log2; });
    }
  }

 private:
  FLASHTILE_DEVICE bool is(LogitsBy by) const {
    return (static_cast<int>(params.logits_by) & static_cast<int>(by)) != 0;
  }

  template <int kKeys>
  FLASHTILE_DEVICE void add_slope(Accumulator<kRows, kKeys>& s, int key) const {
    const ScoreTile at = this->at();
    const ScoreNotes::Place place = at.place();
    const int first = place.distance + at.row - key, lane = ScoreTile::lane();
    const auto distance = static_cast<float>(first + lane / 4 - lane % 4 * 2);
    const float slope = first > 0 ? place.slope_log2 : -place.slope_log2;
    if (first >= kKeys - 1 || first <= 1 - kRows) {  // on one side of the diagonal
      float of_row[kRows / 8];
      FLASHTILE_UNROLL
      for (int r = 0; r < kRows / 8; ++r)
        of_row[r] = -slope * (distance + static_cast<float>(8 * r));
      for_each(s, [&](float& x, int m, int n, int i) {
        x = fmaf(slope, static_cast<float>(8 * n + i % 2),
                 fmaf(x, params.factor, of_row[2 * m + i / 2]));
      });
    } else {
      for_each(s, [&](float& x, int m, int n, int i) {
        const float d = distance + static_cast<float>(16 * m + i / 2 * 8);
        x = fmaf(-place.slope_log2, fabsf(d - static_cast<float>(8 * n + i % 2)),
                 x * params.factor);
      });
    }
  }
};

// What a kernel is given, from what the plain one is given.
template <class Kernel, class Base>
typename Kernel::Params with_hooks(const Base& base, const Problem& problem, const Scores& scores) {
  if constexpr (Kernel::Hooks::kExist) {
    typename Kernel::Params params{base, hook_params(problem, scores, Kernel::Hooks::kDividesBias)};
    if (params.scores.scales) {
      const bool is_cap = params.scores.logits_by == LogitsBy::kCap;
      params.scale_log2 = is_cap ? 2 * params.scores.cap_log2 : 1.0f;
      params.negate_q = false;
    }
    return params;
  } else {
    return base;
  }
}

}  // namespace flashtile
