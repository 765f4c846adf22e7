// Online softmax over rows of a score tile (FlashAttention-2, Algorithm 1), in base 2: the scores
// already carry the factor softmax_scale * log2(e).
#pragma once

#include "exp2.h"
#include "gemm.h"
#include "storage.h"

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

// Replaces `seen` scores by the weights 2^(score - largest) and the rest up to `width` by zeros,
// and updates the state. Returns the factor that the row's earlier output has to be multiplied
// with. `width` may be rounded up to whole vectors.
template <class C, int kDegree>
FLASHTILE_INLINE C weigh_row(C* scores, int64_t seen, int64_t width, RowState<C>& state) {
  constexpr int kWidth = kLanes<C>;
  const int64_t end = round_up(width, kWidth);
  for (int64_t i = seen; i < end; ++i) scores[i] = -kInfinity<C>;
  const C found = row_maximum(scores, end);
  const C largest = found > state.largest ? found : state.largest;
  const C base = largest == -kInfinity<C> ? C{0} : largest;  // -inf - -inf would be NaN
  Vec<C> sum[2] = {Vec<C>{}, Vec<C>{}};
  int64_t i = 0;
  for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const Vec<C> weight = exp2<C, kDegree>(load(scores + i + u * kWidth) - base);
      sum[u] += weight;
      store(scores + i + u * kWidth, weight);
    }
  }
  if (i < end) {
    const Vec<C> weight = exp2<C, kDegree>(load(scores + i) - base);
    sum[0] += weight;
    store(scores + i, weight);
  }
  const C factor =
      largest == state.largest ? C{1} : exp2<C, kDegree>(splat(state.largest - base))[0];
  state.largest = largest;
  state.sum = state.sum * factor + sum_of_lanes<C>(sum[0] + sum[1]);
  return factor;
}

template <class C>
FLASHTILE_INLINE void scale_row(C* row, int64_t count, C factor) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store(row + i, load(row + i) * factor);
}

// Natural logarithm of the sum of exp(score); -inf for a row without keys.
template <class C>
inline float log_sum_exp(const RowState<C>& state) {
  if (state.sum == 0) return -__builtin_inff();
  return static_cast<float>(static_cast<double>(state.largest) * kLn2 +
                            __builtin_log(static_cast<double>(state.sum)));
}

// Writes output / sum and the log-sum-exp of one query row; a row without keys gets 0 and -inf.
template <class T>
inline void finish_row(const Compute<T>* output, const RowState<Compute<T>>& state, int64_t dim,
                       T* out, float* lse) {
  using C = Compute<T>;
  narrow(output, dim, state.sum == 0 ? C{0} : C{1} / state.sum, out);
  if (lse != nullptr) *lse = log_sum_exp(state);
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
