// A policy's hooks (scores.cuh) in a warp's 16 rows of a tile, for the loop of sm_90a. Of
// PlainScores there are none.
//
// Softcap alone and ALiBi alone have code of their own. In that of the cap the softmax's
// multiply-add is the cap's last one: cap tanh(u) = 2 cap / (1 + e^(-2 u)) - cap. S becomes the
// quotient, the softmax scales it by 2 cap, and the LSE lacks the cap until the end.
#pragma once

#include <cmath>

#include "scores.cuh"

namespace flashtile {

// What makes logits of scores.
enum class LogitsBy : int32_t { kSoftmax, kCap, kSlope, kAll };

struct HookParams : ScoreParams {
  LogitsBy logits_by;
};

inline HookParams hook_params(const Problem& problem, const Scores& scores) {
  HookParams p{score_params(problem, scores), LogitsBy::kAll};
  const bool has_slope = scores.alibi_slopes.exists();
  if (!p.scales && !scores.mask.exists()) {
    p.logits_by = LogitsBy::kSoftmax;
  } else if (scores.hides_keys() || scores.query_scale.exists() || scores.max_logit.exists()) {
    return p;
  } else if (has_slope && scores.softcap == 0) {
    p.logits_by = LogitsBy::kSlope;
  } else if (!has_slope && std::isnormal(p.cap_log2) && std::isfinite(2 * p.cap_log2)) {
    p.logits_by = LogitsBy::kCap;
  }
  return p;
}

template <class Policy>
struct ScoreHooks {
  static constexpr bool kExist = false;
  template <class Base>
  using Params = Base;

  template <class Base>
  FLASHTILE_DEVICE ScoreHooks(const Base&, uint32_t) {}
};

template <>
struct ScoreHooks<ModifiedScores> {
  static constexpr bool kExist = true;
  template <class Base>
  struct Params : Base {
    HookParams scores;
  };
  const HookParams& params;
  uint32_t notes;

  template <class Base>
  FLASHTILE_DEVICE ScoreHooks(const Params<Base>& params, uint32_t notes)
      : params(params.scores), notes(notes) {}

  // The rows of a warp behind the warpgroup that loads: kept, they would take a register.
  FLASHTILE_DEVICE ScoreTile at() const { return {notes, ptx::thread_index() / 32 * 16 - 64}; }

  // S -> logits, or what the softmax scales to logits; hidden by the mask: -inf. `key`: the tile's
  // first one.
  template <int kKeys>
  FLASHTILE_DEVICE void to_logits(Accumulator<16, kKeys>& s, int key) const {
    if (params.logits_by == LogitsBy::kSoftmax) return;
    if (params.logits_by == LogitsBy::kCap) {
      const float factor = -params.factor;
      for_each(s, [&](float& x, int, int, int) { x = ptx::rcp(1.0f + ptx::ex2(x * factor)); });
    } else if (params.logits_by == LogitsBy::kSlope) {
      add_slope(s, key);
    } else {
      ModifiedScores::to_logits(s, params, at(), key);
    }
  }
  template <int kKeys>
  FLASHTILE_DEVICE void keep_top(const Accumulator<16, kKeys>& s) const {
    if (params.of.max_logit.exists()) ModifiedScores::keep_top(s, at());
  }
  // P -> P without what is dropped.
  template <int kKeys>
  FLASHTILE_DEVICE void drop(Accumulator<16, kKeys>& p, int key) const {
    const Dropout& dropout = params.of.dropout;
    if (!dropout.exists()) return;
    FLASHTILE_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) ModifiedScores::drop(p, step, dropout, at(), key);
  }

  // After the last tile: the largest logit, and the offset as the LSE wants it.
  FLASHTILE_DEVICE void finish(OnlineSoftmax<16>& softmax, int head) const {
    const ScoreView& max_logit = params.of.max_logit;
    if (max_logit.exists()) ModifiedScores::raise_max_logit(max_logit, head, at());
    if (params.logits_by == LogitsBy::kCap) {
      softmax.offset[0][0] += params.cap_log2;
      softmax.offset[0][1] += params.cap_log2;
    }
  }

 private:
  template <int kKeys>
  FLASHTILE_DEVICE void add_slope(Accumulator<16, kKeys>& s, int key) const {
    const ScoreTile at = this->at();
    const ScoreNotes::Place place = at.place();
    const int first = place.distance + at.row - key, lane = ScoreTile::lane();
    const auto distance = static_cast<float>(first + lane / 4 - lane % 4 * 2);
    const float slope = first > 0 ? place.slope_log2 : -place.slope_log2;
    if (first >= kKeys - 1 || first <= -15) {  // on one side of the diagonal
      const float of_row[2] = {-slope * distance, -slope * (distance + 8.0f)};
      for_each(s, [&](float& x, int, int n, int i) {
        x = fmaf(slope, static_cast<float>(8 * n + i % 2), fmaf(x, params.factor, of_row[i / 2]));
      });
    } else {
      for_each(s, [&](float& x, int, int n, int i) {
        const float d = distance + static_cast<float>(i / 2 * 8);
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
    typename Kernel::Params params{base, hook_params(problem, scores)};
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
