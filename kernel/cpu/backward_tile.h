// One tile of the backward pass: a block of keys against a block of queries, transposed (keys are
// rows), so that the log-sum-exp and delta of the queries are vectors along the rows.
//
//   S^T = K Q^T              P^T  = 2^(S^T - lse)         dV += P^T dO
//   dP^T = V dO^T            dS^T = P^T (dP^T - delta)    dK += dS^T Q      dQ += dS K
#pragma once

#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// A block of queries as right operands, and what belongs to each query.
template <class C>
struct QueryBlock {
  const C* q_transposed;     // [panels][head_dim][kPanel], times softmax_scale * log2(e)
  const C* dout_transposed;  // [panels][head_dim][kPanel]
  const C* q;                // [head_dim panels][queries][kPanel]
  const C* dout;             // [head_dim panels][queries][kPanel]
  const C* lse;    // [queries up to a panel], base 2; +inf for rows without keys and padding
  const C* delta;  // [queries up to a panel], dot(out, dout) - dlse
  int64_t queries;
  bool finite;  // no inf or NaN in q and dout
};

// A block of keys as left operands (rows) and as right operand.
template <class C>
struct KeyBlock {
  Matrix<C> k;      // [keys, head_dim]
  Matrix<C> v;      // [keys, head_dim]
  const C* packed;  // k as [head_dim panels][keys][kPanel]
  int64_t keys;
  bool finite;  // no inf or NaN in k
};

template <class C>
struct BackwardTile {
  Matrix<C> p;   // [keys, queries]: S^T, then P^T
  Matrix<C> ds;  // [keys, queries]: dP^T, then dS^T
};

// to = rows * panels where some query of the panel sees the key.
template <class C>
void multiply_transposed(const Matrix<C>& rows, const C* panels, int64_t dim, int64_t queries,
                         const Visible& visible, const Matrix<C>& to) {
  for (int64_t i = 0; i < queries; i += kPanel<C>) {
    const int64_t end = visible.end(i + kPanel<C> - 1);
    for (int64_t r = 0; r < end; r += kTileRows) {
      multiply_tile<C, kTileRows, Left::kRowMajor, false>(
          rows.row(r), rows.stride, panels + i * dim, dim, to.row(r) + i, to.stride);
    }
  }
}

// S^T, dP^T -> P^T, dS^T for one key. Queries in front of `begin` do not see it: zeros, as far in
// front as the products of the row's group read.
template <class C, int kDegree>
FLASHTILE_INLINE void differentiate_row(C* p, C* ds, int64_t begin, const QueryBlock<C>& block) {
  constexpr int kWidth = kLanes<C>;
  const int64_t zero_from = round_down(larger_of(begin - kTileRows, 0), kWidth);
  const IntVec<C> lane = lane_numbers<C>();
  using Integer = typename VecTypes<C>::Integer;
  int64_t i = zero_from;
  for (; i < begin; i += kWidth) {
    const IntVec<C> seen = lane >= static_cast<Integer>(begin - i);
    const Vec<C> weight = exp2<C, kDegree>(load(p + i) - load(block.lse + i));
    const Vec<C> slope = weight * (load(ds + i) - load(block.delta + i));
    store(p + i, bit_cast<Vec<C>>(bit_cast<IntVec<C>>(weight) & seen));
    store(ds + i, bit_cast<Vec<C>>(bit_cast<IntVec<C>>(slope) & seen));
  }
  for (; i < block.queries; i += kWidth) {
    const Vec<C> weight = exp2<C, kDegree>(load(p + i) - load(block.lse + i));
    store(p + i, weight);
    store(ds + i, weight * (load(ds + i) - load(block.delta + i)));
  }
}

// to[key] += sum over queries of left[key][query] * panels[query]. kRows = 1 reads exactly the
// queries that see the key.
template <class C, int kRows>
void accumulate_keys(const Matrix<C>& left, const C* panels, int64_t queries,
                     const Visible& visible, const Matrix<C>& to) {
  for (int64_t d = 0; d < to.stride; d += kPanel<C>) {
    for (int64_t r = 0; r < visible.keys; r += kRows) {
      const int64_t begin = visible.begin(r);
      if (begin >= queries) break;
      multiply_tile<C, kRows, Left::kRowMajor, true>(left.row(r) + begin, left.stride,
                                                     panels + d * queries + begin * kPanel<C>,
                                                     queries - begin, to.row(r) + d, to.stride);
    }
  }
}

// to[query] += sum over keys of ds[key][query] * panels[key].
template <class C, int kRows>
void accumulate_queries(const Matrix<C>& ds, const C* panels, int64_t queries,
                        const Visible& visible, const Matrix<C>& to) {
  for (int64_t d = 0; d < to.stride; d += kPanel<C>) {
    for (int64_t r = 0; r < queries; r += kRows) {
      const int64_t depth = visible.end(smaller_of(r + kRows, queries) - 1);
      if (depth == 0) continue;
      multiply_tile<C, kRows, Left::kTransposed, true>(
          ds.row(0) + r, ds.stride, panels + d * visible.keys, depth, to.row(r) + d, to.stride);
    }
  }
}

template <class C>
struct Gradients {
  Matrix<C> dq;  // rows of the query block
  Matrix<C> dk;  // rows of the key block
  Matrix<C> dv;
};

template <class C, int kDegree>
void differentiate_block(const BackwardTile<C>& tile, const KeyBlock<C>& kv,
                         const QueryBlock<C>& block, int64_t dim, const Visible& visible,
                         const Gradients<C>& sum) {
  multiply_transposed(kv.k, block.q_transposed, dim, block.queries, visible, tile.p);
  multiply_transposed(kv.v, block.dout_transposed, dim, block.queries, visible, tile.ds);
  for (int64_t r = 0; r < kv.keys; ++r) {
    // Keys that no query sees still lie in the row group of one that is seen.
    const int64_t begin = smaller_of(visible.begin(r), block.queries);
    if (visible.begin(round_down(r, kTileRows)) >= block.queries) break;
    differentiate_row<C, kDegree>(tile.p.row(r), tile.ds.row(r), begin, block);
  }
  if (visible.all() || (block.finite && kv.finite)) {
    accumulate_keys<C, kTileRows>(tile.p, block.dout, block.queries, visible, sum.dv);
    accumulate_keys<C, kTileRows>(tile.ds, block.q, block.queries, visible, sum.dk);
    accumulate_queries<C, kTileRows>(tile.ds, kv.packed, block.queries, visible, sum.dq);
  } else {
    accumulate_keys<C, 1>(tile.p, block.dout, block.queries, visible, sum.dv);
    accumulate_keys<C, 1>(tile.ds, block.q, block.queries, visible, sum.dk);
    accumulate_queries<C, 1>(tile.ds, kv.packed, block.queries, visible, sum.dq);
  }
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
