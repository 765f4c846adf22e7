// What the backward pass knows of a query besides its rows: P = 2^(factor (S - base) - rest) and
// delta. base and rest come from the log-sum-exp that the forward pass left.
//
// Where that log-sum-exp is too coarse - so large that its rounding would show in P, or fp32 in a
// pass in fp64 - it is computed again from the same products that P is made of.
#pragma once

#include "arena.h"
#include "scores.h"
#include "sequence.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// The key and value rows of one sequence and head.
template <class T>
struct KeyRows {
  Rows<const T> k;
  Rows<const T> v;
};

template <class C>
struct Statistics {
  C* base;   // a score
  C* rest;   // a logit in base 2; +inf for a query whose log-sum-exp is -inf: P = 0
  C* delta;  // dot(out, dout) - dlse
  C* lse;
  int64_t queries;
  bool is_narrow;  // the log-sum-exp has fewer digits than C

  // What the rounding of a larger log-sum-exp would cost of P: 6e-5 in fp32, 2e-15 in fp64.
  static constexpr C kCoarse = sizeof(C) == sizeof(double) ? C{16} : C{1024};

  static Statistics take(Arena& arena, int64_t queries, bool lse_is_double) {
    Statistics s;
    s.base = arena.take<C>(queries);
    s.rest = arena.take<C>(queries);
    s.delta = arena.take<C>(queries);
    s.lse = arena.take<C>(queries);
    s.queries = queries;
    s.is_narrow = sizeof(C) == sizeof(double) && !lse_is_double;
    return s;
  }
  Statistics block(int64_t q0, int64_t count) const {
    return {base + q0, rest + q0, delta + q0, lse + q0, count, is_narrow};
  }
  void set(int64_t i, double given, C slope) const {
    const bool sees_keys = given != -__builtin_inf();
    base[i] = 0;
    rest[i] = sees_keys ? static_cast<C>(given) * kLog2E<C> : kInfinity<C>;
    delta[i] = sees_keys ? slope : C{0};
    lse[i] = static_cast<C>(given);
  }
  bool is_coarse(int64_t i) const {
    return __builtin_isfinite(lse[i]) &&
           (is_narrow ||
            __builtin_fabs(static_cast<double>(lse[i])) >= static_cast<double>(kCoarse));
  }
  // A log-sum-exp that is not this softmax's own (but of keys that other calls hold, say) stands.
  // `summands` of a score: the forward pass may have added them in another order.
  void refine(int64_t i, const RowState<C>& state, double scale, double sink,
              int64_t summands) const {
    const double top = static_cast<double>(state.largest) * scale;
    const double log_sum =
        __builtin_log(static_cast<double>(state.sum) + __builtin_exp(sink - top));
    const double exact = top + log_sum;
    const double given = static_cast<double>(lse[i]);
    const double unit = is_narrow || sizeof(C) == sizeof(float) ? 0x1p-24 : 0x1p-53;
    const double ulps = is_narrow ? 2 : 8 + static_cast<double>(summands) / 2;
    if (!(__builtin_fabs(exact - given) <= ulps * unit * __builtin_fabs(given))) return;
    base[i] = state.largest;
    rest[i] = static_cast<C>(log_sum / kLn2);
  }
};

// Softmax states of a block of queries, one per column.
template <class C, int64_t kQueries>
struct ColumnStates {
  C largest[kQueries];
  C sum[kQueries];

  ColumnStates() {
    for (int64_t i = 0; i < kQueries; ++i) {
      largest[i] = -kInfinity<C>;
      sum[i] = 0;
    }
  }

  // Takes in a tile of transposed scores: rows are keys.
  template <int kDegree>
  void weigh(const Matrix<C>& scores, const Visible& visible, C factor) {
    for (int64_t i = 0; i < visible.queries; i += kLanes<C>) {
      const auto seen_scores = [&](int64_t j) {
        const IntVec<C> seen = lanes_in<C>(visible.queries_of(j), i);
        return seen != 0 ? load(scores.row(j) + i) : splat(-kInfinity<C>);
      };
      const Range keys = visible.keys_of_group(i, kLanes<C>);
      const Vec<C> before = load(largest + i);
      Vec<C> now = before;
      for (int64_t j = keys.begin; j < keys.end; ++j) now = larger<C>(seen_scores(j), now);
      const Vec<C> base = now == -kInfinity<C> ? Vec<C>{} : now;  // -inf - -inf would be NaN
      Vec<C> total = load(sum + i) * exp2<C, kDegree>(before - base, factor);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        total += exp2<C, kDegree>(seen_scores(j) - base, factor);
      }
      store(largest + i, now);
      store(sum + i, total);
    }
  }
};

// `block`: the queries [q0, q0 + block.queries) of the sequence, packed into `products` from
// packed_q0 on.
template <class Products>
void refine_statistics(Products& products, const KeyRows<typename Products::Storage>& rows,
                       const Visible& sequence, int64_t q0, int64_t packed_q0,
                       const Statistics<Compute<typename Products::Storage>>& block) {
  using T = typename Products::Storage;
  using C = Compute<T>;
  bool coarse = false;
  for (int64_t i = 0; i < block.queries; ++i) coarse = coarse || block.is_coarse(i);
  if (!coarse) return;
  ColumnStates<C, Products::kBlockQ> states;
  const Range seen = sequence.keys_of_group(q0, block.queries);
  for (int64_t k0 = round_down(seen.begin, Products::kBlockK); k0 < seen.end;
       k0 += Products::kBlockK) {
    const int64_t keys = smaller_of(Products::kBlockK, sequence.keys - k0);
    const Visible visible = sequence.block(q0, block.queries, k0, keys);
    products.pack_keys(rows.k.from(k0), rows.v.from(k0), keys);
    products.multiply_scores(packed_q0, {q0, k0}, visible);
    states.template weigh<kExp2Degree<T>>(products.scores(), visible,
                                          products.scores_of_head().factor());
  }
  for (int64_t i = 0; i < block.queries; ++i) {
    if (!block.is_coarse(i)) continue;
    block.refine(i, {states.largest[i], states.sum[i]}, products.scores_of_head().scale(),
                 products.scores_of_head().sink(q0 + i), products.head_dim());
  }
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
