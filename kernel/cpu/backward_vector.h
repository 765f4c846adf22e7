// The products of the backward pass in vectors of fp32 or fp64. Score tiles are transposed (keys
// are rows), so that what belongs to a query is a vector along the rows.
#pragma once

#include "backward_statistics.h"
#include "pack.h"
#include "transposed_scores.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class T>
class VectorBackward {
 public:
  using Storage = T;
  using C = Compute<T>;
  static constexpr int64_t kBlockQ = 96;
  static constexpr int64_t kBlockK = 96;

  static int64_t padded(int64_t dim) { return round_up(dim, kPanel<C>); }

  // Packed queries as right operands, [panels][...][kPanel], block behind block.
  struct Queries {
    C* q_transposed;     // [panels][head_dim][kPanel], negated when softmax_scale is negative
    C* dout_transposed;  // [panels][head_dim_v][kPanel]
    C* q;                // per block [head_dim panels][queries][kPanel]
    C* dout;             // per block [head_dim_v panels][queries][kPanel]

    static Queries take(Arena& arena, const Problem& problem, int64_t queries) {
      return {arena.take<C>(queries * problem.head_dim),
              arena.take<C>(queries * problem.head_dim_v),
              arena.take<C>(queries * padded(problem.head_dim)),
              arena.take<C>(queries * padded(problem.head_dim_v))};
    }
    // Those behind the first `count`, which are whole blocks.
    Queries from(const Problem& problem, int64_t count) const {
      return {q_transposed + count * problem.head_dim, dout_transposed + count * problem.head_dim_v,
              q + count * padded(problem.head_dim), dout + count * padded(problem.head_dim_v)};
    }
  };

  // A block of keys, and its scores with a block of queries.
  struct Tile {
    Matrix<C> k;   // [keys, head_dim]
    Matrix<C> v;   // [keys, head_dim_v]
    C* k_packed;   // k as right operand [head_dim panels][keys][kPanel]
    Matrix<C> p;   // [keys, queries]: S^T, then P^T
    Matrix<C> ds;  // [keys, queries]: dP^T, then dS^T
    TransposedScores<C, kBlockQ, kBlockK> scores;

    static Tile take(Arena& arena, const Problem& problem, const Scores& scores) {
      const int64_t narrow = round_up(problem.head_dim, kLanes<C>);
      const int64_t narrow_v = round_up(problem.head_dim_v, kLanes<C>);
      const int64_t stride = kBlockQ + 2 * kLanes<C>;
      Tile tile;
      tile.k = {arena.take<C>(kBlockK * narrow), narrow};
      tile.v = {arena.take<C>(kBlockK * narrow_v), narrow_v};
      tile.k_packed = arena.take<C>(kBlockK * padded(problem.head_dim));
      tile.p = {arena.take<C>(kBlockK * stride), stride};
      tile.ds = {arena.take<C>(kBlockK * stride), stride};
      tile.scores = TransposedScores<C, kBlockQ, kBlockK>::take(arena, problem, scores);
      return tile;
    }
  };

  struct Gradients {
    C* dq;         // [queries of the block, head_dim]
    Matrix<C> dk;  // [keys of the block, head_dim]
    Matrix<C> dv;  // [keys of the block, head_dim_v]
  };

  VectorBackward(const Problem& problem, const HeadScores<C>& scores, const Queries& queries,
                 const Tile& tile)
      : dim_(problem.head_dim),
        dim_v_(problem.head_dim_v),
        scale_(problem),
        scores_(scores),
        queries_(queries),
        tile_(tile) {}

  // Both say whether no number was inf or NaN, as far as it could meet a zero weight.
  bool pack_queries(int64_t q0, int64_t count, Rows<const T> q, Rows<const T> dout) {
    pack_transposed(q, count, dim_, scale_.sign, queries_.q_transposed + q0 * dim_);
    pack_transposed(dout, count, dim_v_, C{1}, queries_.dout_transposed + q0 * dim_v_);
    const bool q_finite = pack_rows(q, count, dim_, queries_.q + q0 * padded(dim_));
    const bool dout_finite = pack_rows(dout, count, dim_v_, queries_.dout + q0 * padded(dim_v_));
    return q_finite && dout_finite;
  }
  bool pack_keys(Rows<const T> k, Rows<const T> v, int64_t count) {
    copy_rows(k, count, dim_, C{1}, tile_.k);
    copy_rows(v, count, dim_v_, C{1}, tile_.v);
    return pack_rows(k, count, dim_, tile_.k_packed);
  }

  // scores() = S^T of the queries packed from q0 on and the packed keys, as logits where scores
  // change them. `at`: where the block lies in the sequence.
  void multiply_scores(int64_t q0, const BlockPlace& at, const Visible& visible) {
    multiply_transposed(tile_.k, queries_.q_transposed + q0 * dim_, dim_, visible, tile_.p);
    if (!scores_.changes_logits()) return;
    tile_.scores.begin(scores_, at, visible);
    for (int64_t r = 0; r < visible.keys; ++r)
      tile_.scores.to_logits(scores_, tile_.p.row(r), r, at, visible);
  }
  const Matrix<C>& scores() const { return tile_.p; }
  const HeadScores<C>& scores_of_head() const { return scores_; }
  int64_t head_dim() const { return dim_; }

  void differentiate(int64_t q0, const BlockPlace& at, const Visible& visible,
                     const Statistics<C>& statistics, bool finite, const Gradients& sum) {
    multiply(q0, at, visible);
    const bool plain = !scores_.changes_logits() && !scores_.drops().exists();
    tile_.scores.clear_gradients(visible);
    for (int64_t r = 0; r < visible.keys; ++r) {
      const Range group = visible.queries_of_group(round_down(r, kTileRows), kTileRows);
      if (group.empty()) continue;
      if (plain) {
        differentiate_row(r, visible, statistics);
      } else {
        differentiate_logits(r, at, visible, statistics);
      }
    }
    tile_.scores.write_gradients(scores_, at, visible);
    if (finite || (visible.all() && !scores_.hides_keys())) {
      accumulate<kTileRows>(q0, visible, sum);
    } else if (scores_.hides_keys()) {
      accumulate_weighed(q0, visible, sum);
    } else {
      accumulate<1>(q0, visible, sum);
    }
  }

  // The gradients of the logits [keys, queries], 0 where a query does not see a key.
  const Matrix<C>& logit_gradients(int64_t q0, const BlockPlace& at, const Visible& visible,
                                   const Statistics<C>& statistics) {
    multiply(q0, at, visible);
    for (int64_t r = 0; r < visible.keys; ++r) {
      const Range seen = visible.queries_of(r);
      for (int64_t i = 0; i < visible.queries; i += kLanes<C>) {
        const Vec<C> change = differentials(r, i, seen, statistics).dlogit;
        store(tile_.ds.row(r) + i, change);
      }
    }
    return tile_.ds;
  }
  // Of alibi_slopes, so far.
  double slope_gradient() const { return slope_gradient_; }

  static void store_dq(const Problem& problem, const C* dq, C scale, int64_t count, Rows<T> to) {
    for (int64_t i = 0; i < count; ++i) {
      narrow(dq + i * padded(problem.head_dim), problem.head_dim, scale, to.row(i));
    }
  }

 private:
  // to = rows * panels where some query of the panel sees some key of the group.
  static void multiply_transposed(const Matrix<C>& rows, const C* panels, int64_t dim,
                                  const Visible& visible, const Matrix<C>& to) {
    for (int64_t i = 0; i < visible.queries; i += kPanel<C>) {
      const Range seen = visible.keys_of_group(i, kPanel<C>);
      for (int64_t r = round_down(seen.begin, kTileRows); r < seen.end; r += kTileRows) {
        multiply_tile<C, kTileRows, Left::kRowMajor, false>(
            rows.row(r), rows.stride, panels + i * dim, dim, to.row(r) + i, to.stride);
      }
    }
  }

  // S^T, dP^T -> P^T, dS^T for one key: zero for the queries that do not see it, as far as the
  // products of a group of rows or columns read them.
  FLASHTILE_INLINE void differentiate_row(int64_t key, const Visible& visible,
                                          const Statistics<C>& statistics) const {
    constexpr int kWidth = kLanes<C>;
    const Range seen = visible.queries_of(key);
    const int64_t begin = round_down(larger_of(seen.begin - (kTileRows - 1), 0), kWidth);
    const int64_t end = smaller_of(seen.end + kTileRows - 1, visible.queries);
    C* const p = tile_.p.row(key);
    C* const ds = tile_.ds.row(key);
    for (int64_t i = begin; i < end; i += kWidth) {
      const Vec<C> above = load(p + i) - load(statistics.base + i);
      Vec<C> weight = exp2<C, kExp2Degree<T>>(above * scale_.log2 - load(statistics.rest + i));
      Vec<C> slope = weight * (load(ds + i) - load(statistics.delta + i));
      if (i < seen.begin || i + kWidth > seen.end) {
        const IntVec<C> mask = lanes_in<C>(seen, i);
        weight = bit_cast<Vec<C>>(bit_cast<IntVec<C>>(weight) & mask);
        slope = bit_cast<Vec<C>>(bit_cast<IntVec<C>>(slope) & mask);
      }
      store(p + i, weight);
      store(ds + i, slope);
    }
  }

  void multiply(int64_t q0, const BlockPlace& at, const Visible& visible) {
    multiply_scores(q0, at, visible);
    multiply_transposed(tile_.v, queries_.dout_transposed + q0 * dim_v_, dim_v_, visible, tile_.ds);
    tile_.scores.draw(scores_, at, visible);
  }

  // What differentiate_row does, where scores are logits already or dropout drops.
  using Differentials = typename TransposedScores<C, kBlockQ, kBlockK>::Differentials;
  FLASHTILE_INLINE Differentials differentials(int64_t key, int64_t i, const Range& seen,
                                               const Statistics<C>& statistics) const {
    const Vec<C> logit = load(tile_.p.row(key) + i);
    const Vec<C> above = logit - load(statistics.base + i);
    const Vec<C> weight =
        exp2<C, kExp2Degree<T>>(above * scores_.factor() - load(statistics.rest + i));
    const Differentials d = tile_.scores.differentiate(
        scores_, key, i, logit, weight, load(tile_.ds.row(key) + i), load(statistics.delta + i));
    if (i >= seen.begin && i + kLanes<C> <= seen.end) return d;
    const IntVec<C> mask = lanes_in<C>(seen, i);
    return {masked_lanes<C>(d.p, mask), masked_lanes<C>(d.ds, mask),
            masked_lanes<C>(d.dlogit, mask)};
  }
  void differentiate_logits(int64_t key, const BlockPlace& at, const Visible& visible,
                            const Statistics<C>& statistics) {
    const Range seen = visible.queries_of(key);
    const int64_t begin = round_down(larger_of(seen.begin - (kTileRows - 1), 0), kLanes<C>);
    const int64_t end = smaller_of(seen.end + kTileRows - 1, visible.queries);
    const int64_t distance = at.query + scores_.shift() - at.key - key;
    Vec<C> slope_gradient{};
    for (int64_t i = begin; i < end; i += kLanes<C>) {
      const Differentials d = differentials(key, i, seen, statistics);
      store(tile_.p.row(key) + i, d.p);
      store(tile_.ds.row(key) + i, d.ds);
      tile_.scores.keep_gradient(key, i, d.dlogit);
      if (scores_.wants_slope_gradient())
        slope_gradient -= d.dlogit * HeadScores<C>::distances(distance, C{1}, i);
    }
    if (scores_.wants_slope_gradient())
      slope_gradient_ += static_cast<double>(sum_of_lanes<C>(slope_gradient));
  }

  // The three sums without pairs whose weight is 0: a key may be hidden, and hold no number.
  void accumulate_weighed(int64_t q0, const Visible& visible, const Gradients& sum) const {
    for (int64_t r = 0; r < visible.keys; ++r) {
      const Range seen = visible.queries_of(r);
      for (int64_t i = seen.begin; i < seen.end; ++i) {
        const int64_t rows = visible.queries;
        add_weighed(tile_.p.row(r)[i], queries_.dout + q0 * padded(dim_v_) + i * kPanel<C>, rows,
                    sum.dv.row(r), sum.dv.stride);
        add_weighed(tile_.ds.row(r)[i], queries_.q + q0 * padded(dim_) + i * kPanel<C>, rows,
                    sum.dk.row(r), sum.dk.stride);
        add_weighed(tile_.ds.row(r)[i], tile_.k_packed + r * kPanel<C>, visible.keys,
                    sum.dq + i * padded(dim_), padded(dim_));
      }
    }
  }
  // to += weight * row, which lies in panels of `rows` rows.
  static void add_weighed(C weight, const C* row, int64_t rows, C* to, int64_t dim) {
    for (int64_t d = 0; weight != 0 && d < dim; d += kPanel<C>) {
      for (int64_t n = 0; n < kPanel<C>; ++n) to[d + n] += weight * row[d * rows + n];
    }
  }

  // kRows = 1 reads exactly the rows whose weight is not masked.
  template <int kRows>
  void accumulate(int64_t q0, const Visible& visible, const Gradients& sum) const {
    accumulate_keys<kRows>(tile_.p, queries_.dout + q0 * padded(dim_v_), visible, sum.dv);
    accumulate_keys<kRows>(tile_.ds, queries_.q + q0 * padded(dim_), visible, sum.dk);
    accumulate_queries<kRows>({sum.dq, padded(dim_)}, visible);
  }

  // to[key] += sum over queries of left[key][query] * panels[query].
  template <int kRows>
  static void accumulate_keys(const Matrix<C>& left, const C* panels, const Visible& visible,
                              const Matrix<C>& to) {
    for (int64_t d = 0; d < to.stride; d += kPanel<C>) {
      for (int64_t r = 0; r < visible.keys; r += kRows) {
        const Range seen = visible.queries_of_group(r, kRows);
        if (seen.empty()) continue;
        multiply_tile<C, kRows, Left::kRowMajor, true>(
            left.row(r) + seen.begin, left.stride,
            panels + d * visible.queries + seen.begin * kPanel<C>, seen.end - seen.begin,
            to.row(r) + d, to.stride);
      }
    }
  }

  // to[query] += sum over keys of ds[key][query] * k[key].
  template <int kRows>
  void accumulate_queries(const Matrix<C>& to, const Visible& visible) const {
    for (int64_t d = 0; d < to.stride; d += kPanel<C>) {
      for (int64_t r = 0; r < visible.queries; r += kRows) {
        const int64_t rows = smaller_of(kRows, visible.queries - r);
        const Range seen = visible.keys_of_group(r, rows);
        if (seen.empty()) continue;
        multiply_tile<C, kRows, Left::kTransposed, true>(
            tile_.ds.row(seen.begin) + r, tile_.ds.stride,
            tile_.k_packed + d * visible.keys + seen.begin * kPanel<C>, seen.end - seen.begin,
            to.row(r) + d, to.stride);
      }
    }
  }

  const int64_t dim_, dim_v_;
  const Scale<C> scale_;
  const HeadScores<C>& scores_;
  const Queries queries_;
  const Tile tile_;
  double slope_gradient_ = 0;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
