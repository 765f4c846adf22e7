// Forward for few query rows per key/value head (decoding): reading the keys and values once is the
// whole cost, so nothing is packed.
//
// Keys are cut into chunks of fixed length; a task is (sequence, chunk, key/value head), the head
// innermost because rows of one token lie together, and covers all query rows of the head's group.
// Each leaves an unnormalised output and its softmax state; a second phase merges the chunks of a
// row in order, so the result does not depend on the number of threads.
#pragma once

#include "arena.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"
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

// One query row against kLanes keys; rows are padded with zeros to whole vectors.
template <class C>
FLASHTILE_INLINE Vec<C> score_keys(const C* query, const Matrix<const C>& keys, int64_t dim) {
  constexpr int kWidth = kLanes<C>;
  Vec<C> sum[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) sum[i] = Vec<C>{};
  for (int64_t d = 0; d < dim; d += kWidth) {
    const Vec<C> q = load(query + d);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sum[i] += q * load(keys.row(i) + d);
  }
  return sums_of<C>(sum);
}

// out.row(r) += sum over i < kLanes of weights.row(r)[i] * values.row(i), for all rows: each vector
// of the values is read and widened once.
template <class T>
FLASHTILE_INLINE void add_values(const Matrix<Compute<T>>& weights, const Rows<const T>& values,
                                 int64_t rows, int64_t dim, const Matrix<Compute<T>>& out) {
  using C = Compute<T>;
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

// The same for one row and exactly `count` values: an inf or NaN behind them must not meet a zero.
template <class T>
FLASHTILE_INLINE void add_some_values(const Compute<T>* weight, const Rows<const T>& values,
                                      int64_t count, int64_t dim, Compute<T>* out) {
  using C = Compute<T>;
  for (int64_t d = 0; d < dim; d += kLanes<C>) {
    Vec<C> sum = load(out + d);
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * read_some(values.row(i) + d, dim - d);
    store(out + d, sum);
  }
}

// What a thread needs for a task.
template <class C>
struct DecodeTile {
  Matrix<C> q;          // [rows, head_dim], times softmax_scale * log2(e)
  Matrix<C> scores;     // [rows, kDecodeKeys], then the weights
  Matrix<C> keys;       // [kLanes, head_dim], widened
  Matrix<C> out;        // [rows, head_dim], unnormalised
  RowState<C>* states;  // [rows]

  static DecodeTile take(Arena& arena, int64_t rows, int64_t dim) {
    const int64_t stride = round_up(dim, kLanes<C>);
    DecodeTile tile;
    tile.q = {arena.take<C>(round_up(rows, kTileRows) * stride), stride};
    tile.scores = {arena.take<C>(rows * kDecodeKeys), kDecodeKeys};
    tile.keys = {arena.take<C>(kLanes<C> * stride), stride};
    tile.out = {arena.take<C>(rows * stride), stride};
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
        chunks_(chunks_of(extent)) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t shares =
        static_cast<size_t>(problem.batch * problem.num_heads * extent.max_q * chunks_of(extent));
    const size_t bytes =
        static_cast<size_t>(threads) * tile_bytes(problem, extent) + shares * share_bytes(problem);
    return {bytes, bytes};
  }

  void run() {
    const bool flush = sizeof(C) == sizeof(float);
    const int64_t heads = problem_.num_heads_kv;
    parallel_for(threads_, problem_.batch * chunks_ * heads, flush, [&](int64_t task, int thread) {
      attend(task / heads / chunks_, task / heads % chunks_, task % heads, thread);
    });
    parallel_for(threads_, problem_.batch * problem_.num_heads, flush, [&](int64_t task, int) {
      merge(task / problem_.num_heads, task % problem_.num_heads);
    });
  }

 private:
  // The output of one query row over one chunk: [head_dim], unnormalised, and its state.
  struct Share {
    C* out;
    RowState<C>* state;
  };

  static int64_t chunks_of(const Extent& extent) {
    return (extent.max_k + kDecodeKeys - 1) / kDecodeKeys;
  }
  static int64_t rows_of(const Problem& problem, const Extent& extent) {
    return problem.num_heads / problem.num_heads_kv * extent.max_q;
  }
  static size_t tile_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    DecodeTile<C>::take(arena, rows_of(problem, extent), problem.head_dim);
    return arena.used();
  }
  static size_t share_bytes(const Problem& problem) {
    const int64_t dim = round_up(problem.head_dim, kLanes<C>);
    return static_cast<size_t>(dim + 2 * kLanes<C>) * sizeof(C);
  }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  Share share(int64_t batch, int64_t head, int64_t query, int64_t chunk) const {
    const int64_t row = ((batch * problem_.num_heads + head) * extent_.max_q + query) * chunks_;
    C* const at = reinterpret_cast<C*>(
        workspace() + static_cast<size_t>(threads_) * tile_bytes(problem_, extent_) +
        static_cast<size_t>(row + chunk) * share_bytes(problem_));
    return {at + 2 * kLanes<C>, reinterpret_cast<RowState<C>*>(at)};
  }

  // All query rows of the group of `head` against one chunk of its keys. Row r of the tile is query
  // r / group of head head * group + r % group.
  void attend(int64_t batch, int64_t chunk, int64_t head, int thread) const {
    const Sequence seq = sequence_of(problem_, batch);
    const int64_t k0 = chunk * kDecodeKeys;
    const int64_t count = smaller_of(kDecodeKeys, seq.k_len - k0);
    if (count <= 0) return;
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes(problem_, extent_));
    const int64_t dim = problem_.head_dim;
    const DecodeTile<C> tile = DecodeTile<C>::take(arena, rows_of(problem_, extent_), dim);
    const int64_t rows = group_ * seq.q_len;
    const C scale = static_cast<C>(problem_.softmax_scale) * kLog2E<C>;
    for (int64_t r = 0; r < rows; ++r) {
      const Rows<const T> q = query_rows<const T>(params_.q, seq, head * group_ + r % group_);
      widen(q.row(r / group_), dim, scale, tile.q.row(r), tile.q.stride);
    }
    score(tile, key_rows<const T>(params_.k, seq, head).from(k0), rows, count);
    const Visible visible = visible_keys(problem_, seq, 0, k0, count);
    weigh(tile, key_rows<const T>(params_.v, seq, head).from(k0), rows, visible);
    for (int64_t r = 0; r < rows; ++r) {
      const Share to = share(batch, head * group_ + r % group_, r / group_, chunk);
      *to.state = tile.states[r];
      for (int64_t d = 0; d < dim; d += kLanes<C>) store(to.out + d, load(tile.out.row(r) + d));
    }
  }

  // Scores to weights, and tile.out = weights * values.
  void weigh(const DecodeTile<C>& tile, const Rows<const T>& values, int64_t rows,
             const Visible& visible) const {
    const int64_t dim = problem_.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
      tile.states[r] = RowState<C>{};
      for (int64_t d = 0; d < tile.out.stride; d += kLanes<C>) store(tile.out.row(r) + d, Vec<C>{});
      weigh_row<C, kExp2Degree<T>>(tile.scores.row(r), visible.end(r / group_), visible.keys,
                                   tile.states[r]);
    }
    for (int64_t j = 0; j < visible.keys; j += kLanes<C>) {
      const Matrix<C> weights{tile.scores.data + j, tile.scores.stride};
      if (visible.end(0) - j >= kLanes<C>) {  // the first query sees the fewest keys
        add_values<T>(weights, values.from(j), rows, dim, tile.out);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = smaller_of(visible.end(r / group_) - j, kLanes<C>);
        add_some_values<T>(weights.row(r), values.from(j), seen, dim, tile.out.row(r));
      }
    }
  }

  // scores[r][j] for `count` keys; the scores behind them are not used.
  void score(const DecodeTile<C>& tile, const Rows<const T>& keys, int64_t rows,
             int64_t count) const {
    const int64_t dim = problem_.head_dim;
    for (int64_t j = 0; j < count; j += kLanes<C>) {
      const int64_t some = smaller_of(kLanes<C>, count - j);
      Matrix<const C> block{tile.keys.data, tile.keys.stride};
      if constexpr (sizeof(T) == sizeof(C)) {
        if (some == kLanes<C> && dim % kLanes<C> == 0) block = {keys.row(j), keys.stride};
      }
      if (block.data == tile.keys.data) {
        for (int64_t i = 0; i < some; ++i) {
          widen(keys.row(j + i), dim, C{1}, tile.keys.row(i), tile.keys.stride);
        }
        for (int64_t i = some; i < kLanes<C>; ++i) {
          widen(keys.row(j), 0, C{1}, tile.keys.row(i), tile.keys.stride);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        store(tile.scores.row(r) + j, score_keys<C>(tile.q.row(r), block, dim));
      }
    }
  }

  void merge(int64_t batch, int64_t head) const {
    const Sequence seq = sequence_of(problem_, batch);
    const int64_t dim = problem_.head_dim;
    const int64_t chunks = (seq.k_len + kDecodeKeys - 1) / kDecodeKeys;
    const Rows<T> out = query_rows<T>(params_.out, seq, head);
    float* lse = row_values(params_.lse, seq, head);
    for (int64_t i = 0; i < seq.q_len; ++i) {
      RowState<C> all;
      for (int64_t c = 0; c < chunks; ++c) {
        const C largest = share(batch, head, i, c).state->largest;
        if (largest > all.largest) all.largest = largest;
      }
      const C base = all.largest == -kInfinity<C> ? C{0} : all.largest;
      for (int64_t c = 0; c < chunks; ++c) {
        const Share from = share(batch, head, i, c);
        const C factor = exp2<C, kExp2Degree<T>>(splat(from.state->largest - base))[0];
        all.sum += from.state->sum * factor;
        C* const sum = share(batch, head, i, 0).out;
        for (int64_t d = 0; d < round_up(dim, kLanes<C>); d += kLanes<C>) {
          const Vec<C> term = load(from.out + d) * factor;
          store(sum + d, c == 0 ? term : load(sum + d) + term);
        }
      }
      if (chunks == 0) {
        for (int64_t d = 0; d < dim; d += kLanes<C>) write_some(out.row(i) + d, Vec<C>{}, dim - d);
        if (lse != nullptr) lse[i] = -__builtin_inff();
      } else {
        finish_row(share(batch, head, i, 0).out, all, dim, out.row(i),
                   lse == nullptr ? nullptr : lse + i);
      }
    }
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const int64_t group_;
  const int64_t chunks_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
