// The products of decoding in vectors: a few query rows against a chunk of keys and values, which
// are read once, where they lie, and widened on the way.
#pragma once

#include "arena.h"
#include "pack.h"
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

// kRows query rows, padded with zeros to whole vectors, against kLanes / kRows keys; every key is
// read and widened once. Score (r, i) is added up in the same order for every kRows.
template <int kRows, class Source, class C>
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
    for (int r = 0; r < kRows; ++r) {
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
  for (int r = 0; r < kRows; ++r)
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

template <class T>
class VectorDecode {
 public:
  using Storage = T;
  using C = Compute<T>;

  // What a thread needs for a task.
  struct Tile {
    Matrix<C> q;         // [rows, head_dim], negated when softmax_scale is negative
    Matrix<C> scores;    // [rows, kDecodeKeys], then the weights
    Matrix<C> out;       // [rows, head_dim_v], unnormalised
    RowState<C>* state;  // [rows]

    static Tile take(Arena& arena, int64_t rows, const Problem& problem) {
      const int64_t stride = round_up(problem.head_dim, kLanes<C>);
      const int64_t out_stride = round_up(problem.head_dim_v, kLanes<C>);
      Tile tile;
      tile.q = {arena.take<C>(rows * stride), stride};
      tile.scores = {arena.take<C>(rows * kDecodeKeys), kDecodeKeys};
      tile.out = {arena.take<C>(rows * out_stride), out_stride};
      tile.state = arena.take<RowState<C>>(rows);
      return tile;
    }
  };

  // Row r is of query r / group.
  VectorDecode(const Problem& problem, int64_t rows, const Tile& tile)
      : problem_(problem), group_(problem.group()), rows_(rows), scale_(problem), tile_(tile) {}

  void begin(int64_t r, const T* query) const {
    widen(query, problem_.head_dim, scale_.sign, tile_.q.row(r), tile_.q.stride);
    tile_.state[r] = RowState<C>{};
    for (int64_t d = 0; d < tile_.out.stride; d += kLanes<C>) store(tile_.out.row(r) + d, Vec<C>{});
  }

  // One chunk.
  template <class Source>
  void attend(const Source& keys, const Source& values, const Visible& visible) const {
    const Range any = visible.keys_of_group(0, visible.queries);
    score(keys, any);
    prefetch(values, vector_at(round_down(any.begin, kLanes<C>), any), problem_.head_dim_v);
    weigh(values, visible);
  }

  const C* out(int64_t r) const { return tile_.out.row(r); }
  const RowState<C>& state(int64_t r) const { return tile_.state[r]; }

 private:
  // The keys of a range that share the vector of scores that starts at j.
  static Range vector_at(int64_t j, const Range& range) {
    return {larger_of(j, range.begin), smaller_of(j + kLanes<C>, range.end)};
  }

  // Scores to weights, and tile_.out += weights * values.
  template <class Source>
  void weigh(const Source& values, const Visible& visible) const {
    const int64_t dim = problem_.head_dim_v;
    const Range any = visible.keys_of_group(0, visible.queries);  // that some query sees
    const Range every = {visible.keys_of(visible.queries - 1).begin, visible.keys_of(0).end};
    for (int64_t r = 0; r < rows_; ++r) {
      C* const row = tile_.scores.row(r);
      const C factor = weigh_row<C, kExp2Degree<T>>(row, visible.keys_of(r / group_), any,
                                                    scale_.log2, row, tile_.state[r]);
      if (factor != 1) scale_row(tile_.out.row(r), tile_.out.stride, factor);
    }
    for (int64_t j = round_down(any.begin, kLanes<C>); j < any.end; j += kLanes<C>) {
      const Matrix<C> weights{tile_.scores.data + j, tile_.scores.stride};
      prefetch(values, vector_at(j + kLanes<C>, any), dim);
      if (every.begin <= j && every.end >= j + kLanes<C>) {
        add_values(weights, values.from(j), rows_, dim, tile_.out);
        continue;
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const Range seen = visible.keys_of(r / group_);
        add_some_values(weights.row(r), values.from(j),
                        {clamp(seen.begin - j, kLanes<C>), clamp(seen.end - j, kLanes<C>)}, dim,
                        tile_.out.row(r));
      }
    }
  }

  // scores[r][j] for the keys `wanted`, and for others in the same vectors.
  template <class Source>
  void score(const Source& keys, const Range& wanted) const {
    for (int64_t j = round_down(wanted.begin, kLanes<C>); j < wanted.end; j += kLanes<C>) {
      prefetch(keys, vector_at(j + kLanes<C>, wanted), problem_.head_dim);
      const T* list[kLanes<C>];
      for (int64_t i = 0; i < kLanes<C>; ++i) list[i] = keys.row(smaller_of(j + i, wanted.end - 1));
      int64_t r = 0;
      for (; r + kScoreRows<C> <= rows_; r += kScoreRows<C>)
        score_rows<kScoreRows<C>>(RowList<const T>{list}, r, j);
      for (; r < rows_; ++r) score_rows<1>(RowList<const T>{list}, r, j);
    }
  }

  template <int kRows>
  FLASHTILE_INLINE void score_rows(const RowList<const T>& keys, int64_t r, int64_t j) const {
    for (int i = 0; i < kLanes<C>; i += kLanes<C> / kRows) {
      score_keys<kRows>(Matrix<C>{tile_.q.row(r), tile_.q.stride}, keys.from(i), problem_.head_dim,
                        Matrix<C>{tile_.scores.row(r) + j + i, tile_.scores.stride});
    }
  }

  const Problem& problem_;
  const int64_t group_, rows_;
  const Scale<C> scale_;
  const Tile tile_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
