// Forward for few query rows per key/value head (decoding): reading the keys and values once is the
// whole cost, so nothing is packed.
//
// Keys are cut into parts of whole chunks; a task is (sequence, part, key/value head), the head
// innermost because rows of one token lie together, and covers all query rows of the head's group.
// Each leaves an unnormalised output and its softmax state; a second phase merges the parts of a
// row in order, so the result does not depend on the number of threads. Chunks that no query sees
// are not read.
//
// A part is one chunk, or in a cache as many as the sequence's own length asks for: there the
// scratch memory must not grow with the capacity, which may be far beyond any sequence.
#pragma once

#include "arena.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kDecodeKeys = 128;  // per chunk
constexpr int64_t kCacheParts = 32;   // at most, of a sequence in a cache

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

// What a thread needs for a task.
template <class C>
struct DecodeTile {
  Matrix<C> q;          // [rows, head_dim], negated when softmax_scale is negative
  Matrix<C> scores;     // [rows, kDecodeKeys], then the weights
  Matrix<C> out;        // [rows, head_dim_v], unnormalised
  RowState<C>* states;  // [rows]

  static DecodeTile take(Arena& arena, int64_t rows, const Problem& problem) {
    const int64_t stride = round_up(problem.head_dim, kLanes<C>);
    const int64_t out_stride = round_up(problem.head_dim_v, kLanes<C>);
    DecodeTile tile;
    tile.q = {arena.take<C>(rows * stride), stride};
    tile.scores = {arena.take<C>(rows * kDecodeKeys), kDecodeKeys};
    tile.out = {arena.take<C>(rows * out_stride), out_stride};
    tile.states = arena.take<RowState<C>>(rows);
    return tile;
  }
};

template <class T>
class Decode {
 public:
  using C = Compute<T>;

  Decode(const ForwardParams& params, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        extent_(extent),
        threads_(threads),
        group_(problem_.num_heads / problem_.num_heads_kv),
        scale_(problem_) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t shares =
        static_cast<size_t>(all_parts(problem, extent) * problem.num_heads * extent.max_q);
    const size_t bytes =
        static_cast<size_t>(threads) * tile_bytes(problem, extent) + shares * share_bytes(problem);
    return {bytes, bytes};
  }

  void run() {
    const bool flush = sizeof(C) == sizeof(float);
    const int64_t heads = problem_.num_heads_kv;
    const int64_t parts = most_parts(problem_, extent_);
    parallel_for(threads_, problem_.batch * parts * heads, flush, [&](int64_t task, int thread) {
      attend(task / heads / parts, task / heads % parts, task % heads, thread);
    });
    parallel_for(threads_, problem_.batch * problem_.num_heads, flush, [&](int64_t task, int) {
      merge(task / problem_.num_heads, task % problem_.num_heads);
    });
  }

 private:
  // The output of one query row over one part: [head_dim_v], unnormalised, and its state.
  struct Share {
    C* out;
    RowState<C>* state;
  };

  static int64_t chunks_of(int64_t keys) { return (keys + kDecodeKeys - 1) / kDecodeKeys; }
  static int64_t allowed_parts(const Problem& problem) {
    return problem.cache.num_splits > 0 ? problem.cache.num_splits : kCacheParts;
  }
  // Keys of a part, from the length of the sequence alone.
  static int64_t part_keys(const Problem& problem, int64_t keys) {
    if (!problem.cache.exists()) return kDecodeKeys;
    const int64_t allowed = allowed_parts(problem);
    return larger_of(round_up((keys + allowed - 1) / allowed, kDecodeKeys), kDecodeKeys);
  }
  // Of a sequence.
  static int64_t most_parts(const Problem& problem, const Extent& extent) {
    const int64_t chunks = chunks_of(extent.max_k);
    return problem.cache.exists() ? smaller_of(allowed_parts(problem), chunks) : chunks;
  }
  // Of all sequences: each begins a part of its own.
  static int64_t all_parts(const Problem& problem, const Extent& extent) {
    if (problem.cache.exists()) return problem.batch * most_parts(problem, extent);
    return problem.is_varlen() ? problem.total_k / kDecodeKeys + problem.batch
                               : problem.batch * chunks_of(problem.seqlen_k);
  }
  static int64_t rows_of(const Problem& problem, const Extent& extent) {
    return problem.num_heads / problem.num_heads_kv * extent.max_q;
  }
  static size_t tile_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    DecodeTile<C>::take(arena, rows_of(problem, extent), problem);
    return arena.used();
  }
  static size_t share_bytes(const Problem& problem) {
    const int64_t dim = round_up(problem.head_dim_v, kLanes<C>);
    return static_cast<size_t>(dim + 2 * kLanes<C>) * sizeof(C);
  }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  Share share(const Sequence& seq, int64_t head_query, int64_t part) const {
    const bool packed = problem_.is_varlen() && !problem_.cache.exists();
    const int64_t first =
        packed ? seq.k_begin / kDecodeKeys + seq.index : seq.index * most_parts(problem_, extent_);
    const int64_t row = (first + part) * problem_.num_heads * extent_.max_q + head_query;
    C* const at = reinterpret_cast<C*>(
        workspace() + static_cast<size_t>(threads_) * tile_bytes(problem_, extent_) +
        static_cast<size_t>(row) * share_bytes(problem_));
    return {at + 2 * kLanes<C>, reinterpret_cast<RowState<C>*>(at)};
  }
  int64_t head_query(int64_t head, int64_t query) const { return head * extent_.max_q + query; }

  // All query rows of the group of `head` against one part of its keys. Row r of the tile is query
  // r / group of head head * group + r % group.
  void attend(int64_t batch, int64_t part, int64_t head, int thread) const {
    const Sequence seq = sequence_of(problem_, batch);
    if (extent_.leaves_out(seq.q_len)) return;
    const int64_t count = part_keys(problem_, seq.k_len);
    const Range seen = seq.visible.keys_of_group(0, seq.q_len);
    const Range keys = {larger_of(part * count, round_down(seen.begin, kDecodeKeys)),
                        smaller_of((part + 1) * count, seen.end)};
    if (keys.empty()) return;
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes(problem_, extent_));
    const DecodeTile<C> tile = DecodeTile<C>::take(arena, rows_of(problem_, extent_), problem_);
    const int64_t rows = group_ * seq.q_len;
    for (int64_t r = 0; r < rows; ++r) {
      const Rows<const T> q = query_rows<const T>(params_.q, seq, head * group_ + r % group_);
      widen(q.row(r / group_), problem_.head_dim, scale_.sign, tile.q.row(r), tile.q.stride);
      tile.states[r] = RowState<C>{};
      for (int64_t d = 0; d < tile.out.stride; d += kLanes<C>) store(tile.out.row(r) + d, Vec<C>{});
    }
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kDecodeKeys)
      attend_chunk(seq, tile, head, k0);
    for (int64_t r = 0; r < rows; ++r) {
      const Share to = share(seq, head_query(head * group_ + r % group_, r / group_), part);
      *to.state = tile.states[r];
      for (int64_t d = 0; d < tile.out.stride; d += kLanes<C>) {
        store(to.out + d, load(tile.out.row(r) + d));
      }
    }
  }

  // Adds the chunk of keys that starts at k0.
  void attend_chunk(const Sequence& seq, const DecodeTile<C>& tile, int64_t head,
                    int64_t k0) const {
    const int64_t count = smaller_of(kDecodeKeys, seq.k_len - k0);
    const Visible visible = seq.visible.block(0, seq.q_len, k0, count);
    if (!problem_.cache.exists()) {
      return attend_keys(tile, visible, key_rows<const T>(params_.k, seq, head).from(k0),
                         key_rows<const T>(params_.v, seq, head).from(k0));
    }
    const T *k[kDecodeKeys], *v[kDecodeKeys];
    list_keys(problem_, params_.k, seq, head, {k0, k0 + count}, k);
    list_keys(problem_, params_.v, seq, head, {k0, k0 + count}, v);
    attend_keys(tile, visible, RowList<const T>{k}, RowList<const T>{v});
  }

  template <class Source>
  void attend_keys(const DecodeTile<C>& tile, const Visible& visible, const Source& keys,
                   const Source& values) const {
    const int64_t rows = group_ * visible.queries;
    const Range any = visible.keys_of_group(0, visible.queries);
    score(tile, keys, rows, any);
    prefetch(values, vector_at(round_down(any.begin, kLanes<C>), any), problem_.head_dim_v);
    weigh(tile, values, rows, visible);
  }

  // The keys of a range that share the vector of scores that starts at j.
  static Range vector_at(int64_t j, const Range& range) {
    return {larger_of(j, range.begin), smaller_of(j + kLanes<C>, range.end)};
  }

  // Scores to weights, and tile.out += weights * values.
  template <class Source>
  void weigh(const DecodeTile<C>& tile, const Source& values, int64_t rows,
             const Visible& visible) const {
    const int64_t dim = problem_.head_dim_v;
    const Range any = visible.keys_of_group(0, visible.queries);  // that some query sees
    const Range every = {visible.keys_of(visible.queries - 1).begin, visible.keys_of(0).end};
    for (int64_t r = 0; r < rows; ++r) {
      C* const row = tile.scores.row(r);
      const C factor = weigh_row<C, kExp2Degree<T>>(row, visible.keys_of(r / group_), any,
                                                    scale_.log2, row, tile.states[r]);
      if (factor != 1) scale_row(tile.out.row(r), tile.out.stride, factor);
    }
    for (int64_t j = round_down(any.begin, kLanes<C>); j < any.end; j += kLanes<C>) {
      const Matrix<C> weights{tile.scores.data + j, tile.scores.stride};
      prefetch(values, vector_at(j + kLanes<C>, any), dim);
      if (every.begin <= j && every.end >= j + kLanes<C>) {
        add_values(weights, values.from(j), rows, dim, tile.out);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Range seen = visible.keys_of(r / group_);
        add_some_values(weights.row(r), values.from(j),
                        {clamp(seen.begin - j, kLanes<C>), clamp(seen.end - j, kLanes<C>)}, dim,
                        tile.out.row(r));
      }
    }
  }

  // scores[r][j] for the keys `wanted`, and for others in the same vectors.
  template <class Source>
  void score(const DecodeTile<C>& tile, const Source& keys, int64_t rows,
             const Range& wanted) const {
    for (int64_t j = round_down(wanted.begin, kLanes<C>); j < wanted.end; j += kLanes<C>) {
      prefetch(keys, vector_at(j + kLanes<C>, wanted), problem_.head_dim);
      const T* list[kLanes<C>];
      for (int64_t i = 0; i < kLanes<C>; ++i) list[i] = keys.row(smaller_of(j + i, wanted.end - 1));
      int64_t r = 0;
      for (; r + kScoreRows<C> <= rows; r += kScoreRows<C>)
        score_rows<kScoreRows<C>>(tile, RowList<const T>{list}, r, j);
      for (; r < rows; ++r) score_rows<1>(tile, RowList<const T>{list}, r, j);
    }
  }

  template <int kRows>
  FLASHTILE_INLINE void score_rows(const DecodeTile<C>& tile, const RowList<const T>& keys,
                                   int64_t r, int64_t j) const {
    for (int i = 0; i < kLanes<C>; i += kLanes<C> / kRows) {
      score_keys<kRows>(Matrix<C>{tile.q.row(r), tile.q.stride}, keys.from(i), problem_.head_dim,
                        Matrix<C>{tile.scores.row(r) + j + i, tile.scores.stride});
    }
  }

  void merge(int64_t batch, int64_t head) const {
    const Sequence seq = sequence_of(problem_, batch);
    const Range keys = seq.visible.keys_of_group(0, seq.q_len);
    if (extent_.leaves_out(seq.q_len)) return;
    const int64_t count = part_keys(problem_, seq.k_len);
    const Range parts = {keys.begin / count, (keys.end + count - 1) / count};
    const Rows<T> out = query_rows<T>(params_.out, seq, head);
    float* lse = row_values(params_.lse, seq, head);
    for (int64_t i = 0; i < seq.q_len; ++i) {
      const bool sees_keys = !seq.visible.keys_of(i).empty();
      RowState<C> state;
      const C* sum = nullptr;
      if (!keys.empty()) {
        state = merge_row(seq, head_query(head, i), parts);
        sum = share(seq, head_query(head, i), parts.begin).out;
      }
      finish_row<T>({sum, state, sees_keys, scale_.magnitude}, problem_.head_dim_v, out.row(i),
                    lse == nullptr ? nullptr : lse + i);
    }
  }

  // The state of a row over all parts; its output is summed up in the share of the first.
  RowState<C> merge_row(const Sequence& seq, int64_t row, const Range& parts) const {
    RowState<C> all;
    for (int64_t p = parts.begin; p < parts.end; ++p) {
      const C largest = share(seq, row, p).state->largest;
      if (largest > all.largest) all.largest = largest;
    }
    const C base = all.largest == -kInfinity<C> ? C{0} : all.largest;
    C* const sum = share(seq, row, parts.begin).out;
    for (int64_t p = parts.begin; p < parts.end; ++p) {
      const Share from = share(seq, row, p);
      const C factor = exp2<C, kExp2Degree<T>>(splat(from.state->largest - base), scale_.log2)[0];
      all.sum += from.state->sum * factor;
      for (int64_t d = 0; d < problem_.head_dim_v; d += kLanes<C>) {
        const Vec<C> term = load(from.out + d) * factor;
        store(sum + d, p == parts.begin ? term : load(sum + d) + term);
      }
    }
    return all;
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const int64_t group_;
  const Scale<C> scale_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
