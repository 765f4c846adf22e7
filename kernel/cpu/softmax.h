// Online softmax over rows of a score tile (FlashAttention-2, Algorithm 1), in base 2. Scores are
// products of unscaled numbers. The largest is subtracted before the scale is applied: that
// difference is exact where it matters, so that logits of any size come out right.
#pragma once

#include "exp2.h"
#include "gemm.h"
#include "params.h"
#include "storage.h"
#include "visible.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// Degree of the exp2 polynomial: beyond the precision of the storage format nothing is gained.
template <class T>
constexpr int kExp2Degree = 5;
template <>
constexpr int kExp2Degree<float> = 6;
template <>
constexpr int kExp2Degree<double> = 11;

template <class C>
constexpr C kLog2E = static_cast<C>(1.4426950408889634074);
constexpr double kLn2 = 0.69314718055994530942;

// softmax_scale as the softmax uses it. Its sign goes to q.
template <class C>
struct Scale {
  double magnitude;
  C log2;  // magnitude * log2(e); positive even if the scale is 0: -inf * 0 would be NaN
  C sign;

  explicit Scale(const Problem& problem)
      : magnitude(__builtin_fabs(problem.exact_scale)),
        log2(static_cast<C>(magnitude) * kLog2E<C>),
        sign(problem.exact_scale < 0 ? C{-1} : C{1}) {
    constexpr C kSmallest = sizeof(C) == sizeof(float) ? C(1.2e-38) : C(2.3e-308);
    if (log2 < kSmallest) log2 = kSmallest;
  }
};

template <class C>
constexpr C kInfinity = static_cast<C>(__builtin_inf());

// What a query row has seen so far: the largest score and the sum of 2^(score - largest).
template <class C>
struct RowState {
  C largest = -kInfinity<C>;
  C sum = 0;
};

template <class C>
FLASHTILE_INLINE C row_maximum(const C* scores, int64_t count) {
  constexpr int kWidth = kLanes<C>;
  Vec<C> best[4];
  for (Vec<C>& b : best) b = splat(-kInfinity<C>);
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) best[u] = larger<C>(load(scores + i + u * kWidth), best[u]);
  }
  for (; i < count; i += kWidth) best[0] = larger<C>(load(scores + i), best[0]);
  return largest_lane<C>(larger<C>(larger<C>(best[0], best[1]), larger<C>(best[2], best[3])));
}

// The scores of `seen` become the weights 2^(factor * (score - largest)); the rest of `width`,
// whose ends are rounded to whole vectors, gets weight 0. Updates the state; returns what the row's
// earlier output has to be multiplied with. Weights may replace the scores.
template <class C, int kDegree, class Weight>
FLASHTILE_INLINE C weigh_row(C* scores, const Range& seen, const Range& width, C factor,
                             Weight* weights, RowState<C>& state) {
  constexpr int kWidth = kLanes<C>;
  const int64_t begin = round_down(width.begin, kWidth), end = round_up(width.end, kWidth);
  for (int64_t i = begin; i < smaller_of(seen.begin, end); ++i) scores[i] = -kInfinity<C>;
  for (int64_t i = larger_of(seen.end, begin); i < end; ++i) scores[i] = -kInfinity<C>;
  const C found = row_maximum(scores + begin, end - begin);
  const C largest = found > state.largest ? found : state.largest;
  const C base = largest == -kInfinity<C> ? C{0} : largest;  // -inf - -inf would be NaN
  Vec<C> sum[2] = {Vec<C>{}, Vec<C>{}};
  int64_t i = begin;
  for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const Vec<C> weight = exp2<C, kDegree>(load(scores + i + u * kWidth) - base, factor);
      sum[u] += weight;
      write(weights + i + u * kWidth, weight);
    }
  }
  if (i < end) {
    const Vec<C> weight = exp2<C, kDegree>(load(scores + i) - base, factor);
    sum[0] += weight;
    write(weights + i, weight);
  }
  const C rescale =
      largest == state.largest ? C{1} : exp2<C, kDegree>(splat(state.largest - base), factor)[0];
  state.largest = largest;
  state.sum = state.sum * rescale + sum_of_lanes<C>(sum[0] + sum[1]);
  return rescale;
}

template <class C>
FLASHTILE_INLINE void scale_row(C* row, int64_t count, C factor) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store(row + i, load(row + i) * factor);
}

// What flashtile_scores has for the end of a row.
struct RowEnd {
  double sink = -__builtin_inf();  // a logit
  double scale = 1;                // on the output: dropout's
  bool may_be_hidden = false;      // keys can be hidden one by one, and all of a row
};

// What a row of the output is made of.
template <class C>
struct FinishedRow {
  const C* out;  // unnormalised
  RowState<C> state;
  bool sees_keys;
  double scale;  // a score times this is a logit
  RowEnd end = {};
};

// Writes output / sum and the log-sum-exp of one query row. A row that sees no key gets 0 and the
// sink, one whose keys all score -inf is 0 / 0.
template <class T>
inline void finish_row(const FinishedRow<Compute<T>>& row, int64_t dim, T* out,
                       const RowValues& lse) {
  using C = Compute<T>;
  const double sum = static_cast<double>(row.state.sum), sink = row.end.sink;
  if (!row.sees_keys || (row.end.may_be_hidden && sum == 0)) {
    for (int64_t d = 0; d < dim; d += kLanes<C>) write_some(out + d, Vec<C>{}, dim - d);
    if (lse.exists()) lse.set(0, sink);
    return;
  }
  if (sink > -__builtin_inf()) {
    const double largest = static_cast<double>(row.state.largest) * row.scale;
    const double top = largest > sink ? largest : sink;
    const double share = __builtin_exp(largest - top);
    const double total = sum * share + __builtin_exp(sink - top);
    narrow(row.out, dim, static_cast<C>(row.end.scale * share / total), out);
    if (lse.exists()) lse.set(0, top + __builtin_log(total));
    return;
  }
  const double divisor = sum == 0 ? __builtin_nan("") : sum;
  narrow(row.out, dim, static_cast<C>(row.end.scale) / static_cast<C>(divisor), out);
  if (!lse.exists()) return;
  lse.set(0, static_cast<double>(row.state.largest) * row.scale + __builtin_log(divisor));
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
