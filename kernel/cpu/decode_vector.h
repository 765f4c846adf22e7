// The products of decoding in vectors: a few query rows against a chunk of keys and values, which
// are read once, where they lie, and widened on the way.
#pragma once

#include "arena.h"
#include "pack.h"
#include "scores.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kDecodeKeys = 128;  // per chunk

// Lane i of the result is the sum of the lanes of v[i].
template <class C, int kHalf = kLanes<C> / 2>
FLASHTILE_INLINE Vec<C> sums_of(Vec<C> (&v)[kLanes<C>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    swap_blocks_of<C, kHalf>(v[i], v[i + kHalf]);
    v[i] += v[i + kHalf];
  }
  if constexpr (kHalf > 1) {
    return sums_of<C, kHalf / 2>(v);
  } else {
    return v[0];
  }
}

// Asks for the rows that come next: those of one head lie apart in pieces that are too short for
// the processor to see a pattern.
template <class Source>
FLASHTILE_INLINE void prefetch(const Source& rows, const Range& next, int64_t dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename Source::Number));
  for (int64_t i = next.begin; i < next.end; ++i) {
    for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(rows.row(i) + d);
  }
}

// Query rows that a key is held against while it is in registers.
template <class C>
constexpr int kScoreRows = kLanes<C> < 4 ? kLanes<C> : 4;

// kUsed query rows, padded with zeros to whole vectors, against kLanes / kRows keys; every key is
// read and widened once. Score (r, i) is added up in the same order for every kRows.
template <int kRows, int kUsed, class Source, class C>
FLASHTILE_INLINE void score_keys(const Matrix<C>& queries, const Source& keys, int64_t dim,
                                 const Matrix<C>& scores) {
  constexpr int kWidth = kLanes<C>, kKeys = kWidth / kRows;
  Vec<C> sum[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) sum[i] = Vec<C>{};
  const auto add = [&](int64_t d, const auto& read_key) {
    Vec<C> key[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) key[i] = read_key(keys.row(i) + d);
#pragma GCC unroll 4
    for (int r = 0; r < kUsed; ++r) {
      const Vec<C> query = load(queries.row(r) + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += query * key[i];
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) add(d, [](const auto* from) { return read(from); });
  if (d < dim) add(d, [&](const auto* from) { return read_some(from, dim - d); });
  C all[kWidth];
  store(all, sums_of<C>(sum));
#pragma GCC unroll 4
  for (int r = 0; r < kUsed; ++r)
    __builtin_memcpy(scores.row(r), all + r * kKeys, kKeys * sizeof(C));
}

// out.row(r) += sum over i < kLanes of weights.row(r)[i] * values.row(i), for all rows: each vector
// of the values is read and widened once.
template <class Source, class C>
FLASHTILE_INLINE void add_values(const Matrix<C>& weights, const Source& values, int64_t rows,
                                 int64_t dim, const Matrix<C>& out) {
  constexpr int kWidth = kLanes<C>;
  for (int64_t d = 0; d < dim; d += kWidth) {
    Vec<C> value[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) value[i] = read_some(values.row(i) + d, dim - d);
    for (int64_t r = 0; r < rows; ++r) {
      const C* weight = weights.row(r);
      Vec<C> sum[2] = {load(out.row(r) + d), Vec<C>{}};  // two chains hide the latency
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sum[i % 2] += weight[i] * value[i];
      store(out.row(r) + d, sum[0] + sum[1]);
    }
  }
}

// The same for one row and exactly the values `seen`: an inf or NaN elsewhere must not meet a zero.
template <class Source, class C>
FLASHTILE_INLINE void add_some_values(const C* weight, const Source& values, const Range& seen,
                                      int64_t dim, C* out) {
  for (int64_t d = 0; d < dim; d += kLanes<C>) {
    Vec<C> sum = load(out + d);
    for (int64_t i = seen.begin; i < seen.end; ++i)
      sum += weight[i] * read_some(values.row(i) + d, dim - d);
    store(out + d, sum);
  }
}

// T: of q and out. K: of k and v.
template <class T, class K = T>
class VectorDecode {
 public:
  using Storage = T;
  using KeyStorage = K;
  using C = Compute<T>;

  // What a thread needs for a task.
  struct Tile {
    Matrix<C> q;         // [rows, head_dim], negated when softmax_scale is negative
    Matrix<C> scores;    // [rows, kDecodeKeys], then the weights
    Matrix<C> out;       // [rows, head_dim_v], unnormalised
    RowState<C>* state;  // [rows]
    uint8_t* kept;       // [2, kDecodeKeys] with dropout: DropMask

    static Tile take(Arena& arena, int64_t rows, const Problem& problem, const Scores& scores) {
      const int64_t stride = round_up(problem.head_dim, kLanes<C>);
      const int64_t out_stride = round_up(problem.head_dim_v, kLanes<C>);
      Tile tile;
      tile.q = {arena.take<C>(rows * stride), stride};
      tile.scores = {arena.take<C>(rows * kDecodeKeys), kDecodeKeys};
      tile.out = {arena.take<C>(rows * out_stride), out_stride};
      tile.state = arena.take<RowState<C>>(rows);
      tile.kept = scores.dropout.exists() ? arena.take<uint8_t>(2 * kDecodeKeys) : nullptr;
      return tile;
    }
  };

  // Row r is of query r / group.
  VectorDecode(const Problem& problem, const GroupScores<C>& scores, int64_t rows, const Tile& tile)
      : problem_(problem),
        scores_(scores),
        group_(problem.group()),
        rows_(rows),
        scale_(problem),
        factor_(scores.factor()),
        tile_(tile) {}

  void begin(int64_t r, const T* query) const {
    widen(query, problem_.head_dim, scale_.sign, tile_.q.row(r), tile_.q.stride);
    tile_.state[r] = RowState<C>{};
    for (int64_t d = 0; d < tile_.out.stride; d += kLanes<C>) store(tile_.out.row(r) + d, Vec<C>{});
  }

  // One chunk, from key k0 of the sequence on.
  template <class Source>
  void attend(const Source& keys, const Source& values, int64_t k0, const Visible& visible) const {
    const Range any = visible.keys_of_group(0, visible.queries);
    score(keys, any);
    prefetch(values, vector_at(round_down(any.begin, kLanes<C>), any), problem_.head_dim_v);
    weigh(k0, visible);
    add(values, visible);
  }

  const C* out(int64_t r) const { return tile_.out.row(r); }
  const RowState<C>& state(int64_t r) const { return tile_.state[r]; }

 private:
  // The keys of a range that share the vector of scores that starts at j.
  static Range vector_at(int64_t j, const Range& range) {
    return {larger_of(j, range.begin), smaller_of(j + kLanes<C>, range.end)};
  }

  // Scores to weights.
  void weigh(int64_t k0, const Visible& visible) const {
    const Range any = visible.keys_of_group(0, visible.queries);  // that some query sees
    for (int64_t r = 0; r < rows_; ++r) {
      C* const row = tile_.scores.row(r);
      const Range seen = visible.keys_of(r / group_);
      if (scores_.changes_logits()) scores_.of_row(r).to_logits(row, seen, r / group_, k0);
      const C factor = weigh_row<C, kExp2Degree<T>>(row, seen, any, factor_, row, tile_.state[r]);
      if (factor != 1) scale_row(tile_.out.row(r), tile_.out.stride, factor);
      if (scores_.drops()) drop(r, k0, seen);
    }
  }
  void drop(int64_t r, int64_t k0, const Range& seen) const {
    uint8_t* const kept = tile_.kept;
    scores_.of_row(r).drops().fill_row(r / group_, k0, seen.end, kept, kept + kDecodeKeys);
    drop_weights(tile_.scores.row(r), seen, kept);
  }

  // tile_.out += weights * values.
  template <class Source>
  void add(const Source& values, const Visible& visible) const {
    const int64_t dim = problem_.head_dim_v;
    const Range any = visible.keys_of_group(0, visible.queries);
    const Range every = {visible.keys_of(visible.queries - 1).begin, visible.keys_of(0).end};
    for (int64_t j = round_down(any.begin, kLanes<C>); j < any.end; j += kLanes<C>) {
      const Matrix<C> weights{tile_.scores.data + j, tile_.scores.stride};
      prefetch(values, vector_at(j + kLanes<C>, any), dim);
      if (every.begin <= j && every.end >= j + kLanes<C> &&
          !(scores_.hides_keys() && has_zero(weights))) {
        add_values(weights, values.from(j), rows_, dim, tile_.out);
        continue;
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const Range seen = visible.keys_of(r / group_);
        add_seen(weights.row(r), values.from(j),
                 {clamp(seen.begin - j, kLanes<C>), clamp(seen.end - j, kLanes<C>)},
                 tile_.out.row(r));
      }
    }
  }
  // Some row gives one of these kLanes values no weight.
  bool has_zero(const Matrix<C>& weights) const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t i = 0; i < kLanes<C>; ++i) {
        if (weights.row(r)[i] == 0) return true;
      }
    }
    return false;
  }
  // A key that is hidden among those that are seen has weight 0, and its value may be no number.
  template <class Source>
  void add_seen(const C* weight, const Source& values, const Range& seen, C* out) const {
    const int64_t dim = problem_.head_dim_v;
    if (!scores_.hides_keys()) return add_some_values(weight, values, seen, dim, out);
    for (int64_t i = seen.begin; i < seen.end; ++i) {
      if (weight[i] != 0) add_some_values(weight, values, {i, i + 1}, dim, out);
    }
  }

  // scores[r][j] for the keys `wanted`, and for others in the same vectors.
  template <class Source>
  void score(const Source& keys, const Range& wanted) const {
    for (int64_t j = round_down(wanted.begin, kLanes<C>); j < wanted.end; j += kLanes<C>) {
      prefetch(keys, vector_at(j + kLanes<C>, wanted), problem_.head_dim);
      const K* list[kLanes<C>];
      for (int64_t i = 0; i < kLanes<C>; ++i) list[i] = keys.row(smaller_of(j + i, wanted.end - 1));
      for (int64_t r = 0; r < rows_; r += kScoreRows<C>)
        score_rows<kScoreRows<C>>(RowList<const K>{list}, r, j);
    }
  }

  // Of rows r to r + kUsed - 1, or of fewer where there are not so many.
  template <int kUsed>
  FLASHTILE_INLINE void score_rows(const RowList<const K>& keys, int64_t r, int64_t j) const {
    if constexpr (kUsed > 1) {
      if (rows_ - r < kUsed) return score_rows<kUsed - 1>(keys, r, j);
    }
    constexpr int kRows = kUsed == 3 ? 4 : kUsed;  // what divides the lanes
    for (int i = 0; i < kLanes<C>; i += kLanes<C> / kRows) {
      const Matrix<C> scores{tile_.scores.row(r) + j + i, tile_.scores.stride};
      score_keys<kRows, kUsed>(Matrix<C>{tile_.q.row(r), tile_.q.stride}, keys.from(i),
                               problem_.head_dim, scores);
    }
  }

  const Problem& problem_;
  const GroupScores<C> scores_;
  const int64_t group_, rows_;
  const Scale<C> scale_;
  const C factor_;
  const Tile tile_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
