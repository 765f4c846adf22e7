// The products of the backward pass for bfloat16 on tiles (tiles.h). P and dS are rounded to
// bfloat16; dQ is accumulated transposed, dQ^T += K^T dS^T, so that dS^T is a right operand without
// another transposition.
#pragma once

#include "backward_statistics.h"
#include "tiles_pack.h"
#include "transposed_scores.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

class TileBackward {
 public:
  using Storage = BFloat16;
  static constexpr int64_t kBlockQ = 256;
  static constexpr int64_t kBlockK = 128;

  static int64_t padded(int64_t dim) { return round_up(dim, kTilePair); }

  // Packed queries as right operands, block behind block.
  struct Queries {
    BFloat16* q_columns;     // [head_dim, queries]; negated when softmax_scale is negative
    BFloat16* dout_columns;  // [head_dim_v, queries]
    BFloat16* q_rows;        // per block [queries, head_dim]
    BFloat16* dout_rows;     // per block [queries, head_dim_v]

    static Queries take(Arena& arena, const Problem& problem, int64_t queries) {
      const int64_t size = queries * padded(problem.head_dim);
      const int64_t size_v = queries * padded(problem.head_dim_v);
      return {arena.take<BFloat16>(size), arena.take<BFloat16>(size_v), arena.take<BFloat16>(size),
              arena.take<BFloat16>(size_v)};
    }
    // Those behind the first `count`, which are whole blocks.
    Queries from(const Problem& problem, int64_t count) const {
      const int64_t size = count * padded(problem.head_dim);
      const int64_t size_v = count * padded(problem.head_dim_v);
      return {q_columns + size, dout_columns + size_v, q_rows + size, dout_rows + size_v};
    }
  };

  // A block of keys as left operands, and its scores with a block of queries.
  struct Tile {
    TileRows k;          // [keys, head_dim]
    TileRows v;          // [keys, head_dim_v]
    TileRows k_columns;  // [head_dim, keys]
    Matrix<float> s;     // [keys, queries]: S^T
    Matrix<float> dp;    // [keys, queries]: dP^T
    TileRows p;          // [keys, queries]: P^T
    TileRows ds;         // [keys, queries]: dS^T
    BFloat16* pairs;     // dS^T as right operand [keys, queries]
    TransposedScores<float, kBlockQ, kBlockK> scores;

    static Tile take(Arena& arena, const Problem& problem, const Scores& scores) {
      const int64_t wide = padded(problem.head_dim), wide_v = padded(problem.head_dim_v);
      const int64_t stride = kBlockQ + kTilePair;
      Tile tile;
      tile.k = {arena.take<BFloat16>(kBlockK * wide), wide};
      tile.v = {arena.take<BFloat16>(kBlockK * wide_v), wide_v};
      tile.k_columns = {arena.take<BFloat16>(wide * kBlockK), kBlockK};
      tile.s = {arena.take<float>(kBlockK * stride), stride};
      tile.dp = {arena.take<float>(kBlockK * stride), stride};
      tile.p = {arena.take<BFloat16>(kBlockK * stride), stride};
      tile.ds = {arena.take<BFloat16>(kBlockK * stride), stride};
      tile.pairs = arena.take<BFloat16>(kBlockK * kBlockQ);
      tile.scores = TransposedScores<float, kBlockQ, kBlockK>::take(arena, problem, scores);
      return tile;
    }
    TilePanels pairs_of(int64_t keys) const { return {pairs, round_up(keys, kTilePair)}; }
  };

  struct Gradients {
    float* dq;         // transposed: [head_dim, kBlockQ]
    Matrix<float> dk;  // [keys of the block, head_dim]
    Matrix<float> dv;  // [keys of the block, head_dim_v]
  };

  TileBackward(const Problem& problem, const HeadScores<float>& scores, const Queries& queries,
               const Tile& tile)
      : dim_(problem.head_dim),
        dim_v_(problem.head_dim_v),
        scale_(problem),
        scores_(scores),
        queries_(queries),
        tile_(tile) {}

  // Both say whether no number was inf or NaN, as far as it could meet a zero weight.
  bool pack_queries(int64_t q0, int64_t count, Rows<const BFloat16> q, Rows<const BFloat16> dout) {
    const TilePanels columns = columns_at(queries_.q_columns, q0, dim_);
    pack_right_transposed(q, count, dim_, columns);
    if (scale_.sign < 0) flip_signs(columns.data, round_up(count, kTilePair) * columns.depth);
    pack_right_transposed(dout, count, dim_v_, columns_at(queries_.dout_columns, q0, dim_v_));
    pack_right(q, count, dim_, rows_at(queries_.q_rows, q0, count, dim_));
    pack_right(dout, count, dim_v_, rows_at(queries_.dout_rows, q0, count, dim_v_));
    return all_finite(q, count, dim_) && all_finite(dout, count, dim_v_);
  }
  bool pack_keys(Rows<const BFloat16> k, Rows<const BFloat16> v, int64_t count) {
    pack_left(k, count, dim_, tile_.k);
    pack_left(v, count, dim_v_, tile_.v);
    pack_left_transposed(k, count, dim_, tile_.k_columns);
    return all_finite(k, count, dim_);
  }

  // scores() = S^T of the queries packed from q0 on and the packed keys, as logits where scores
  // change them. `at`: where the block lies in the sequence.
  void multiply_scores(int64_t q0, const BlockPlace& at, const Visible& visible) {
    multiply_seen(tile_.k, columns_at(queries_.q_columns, q0, dim_), visible, tile_.s);
    if (!scores_.changes_logits()) return;
    tile_.scores.begin(scores_, at, visible);
    for (int64_t r = 0; r < visible.keys; ++r)
      tile_.scores.to_logits(scores_, tile_.s.row(r), r, at, visible);
  }
  const Matrix<float>& scores() const { return tile_.s; }
  const HeadScores<float>& scores_of_head() const { return scores_; }
  int64_t head_dim() const { return dim_; }

  void differentiate(int64_t q0, const BlockPlace& at, const Visible& visible,
                     const Statistics<float>& statistics, bool finite, const Gradients& sum) {
    multiply(q0, at, visible);
    distance_ = at.query + scores_.shift() - at.key;
    tile_.scores.clear_gradients(visible);
    if (scores_.changes_logits() || scores_.drops().exists()) {
      for (int64_t key = 0; key < round_up(visible.keys, kTilePair); key += 2)
        differentiate_keys<true>(key, visible, statistics);
    } else {
      for (int64_t key = 0; key < round_up(visible.keys, kTilePair); key += 2)
        differentiate_keys<false>(key, visible, statistics);
    }
    tile_.scores.write_gradients(scores_, at, visible);
    const TilePanels dout = rows_at(queries_.dout_rows, q0, visible.queries, dim_v_);
    const TilePanels q = rows_at(queries_.q_rows, q0, visible.queries, dim_);
    if (finite || (visible.all() && !scores_.hides_keys())) {
      accumulate_keys(tile_.p, dout, visible, sum.dv);
      accumulate_keys(tile_.ds, q, visible, sum.dk);
      accumulate_queries(sum.dq, visible);
    } else {
      accumulate_seen(q, dout, visible, sum);
    }
  }

  // The gradients of the logits [keys, queries], 0 where a query does not see a key.
  const Matrix<float>& logit_gradients(int64_t q0, const BlockPlace& at, const Visible& visible,
                                       const Statistics<float>& statistics) {
    multiply(q0, at, visible);
    for (int64_t r = 0; r < visible.keys; ++r) {
      const Range seen = visible.queries_of(r);
      for (int64_t i = 0; i < visible.queries; i += kLanes<float>) {
        const Vec<float> change = differentials(r, i, statistics).dlogit;
        const IntVec<float> mask = lanes_in<float>(seen, i);
        store(tile_.dp.row(r) + i, masked_lanes<float>(change, mask));
      }
    }
    return tile_.dp;
  }
  // Of alibi_slopes, so far.
  double slope_gradient() const { return slope_gradient_; }

  // to = scale * transposed sums.
  static void store_dq(const Problem& problem, const float* dq, float scale, int64_t count,
                       Rows<BFloat16> to) {
    constexpr int kWidth = kLanes<float>;
    for (int64_t i = 0; i < count; i += kWidth) {
      for (int64_t d = 0; d < problem.head_dim; d += kWidth) {
        Vec<float> square[kWidth];
        for (int n = 0; n < kWidth; ++n) square[n] = load(dq + (d + n) * kBlockQ + i);
        transpose<float>(square);
        for (int n = 0; n < smaller_of(kWidth, count - i); ++n) {
          write_some(to.row(i + n) + d, square[n] * scale, problem.head_dim - d);
        }
      }
    }
  }

 private:
  static TilePanels columns_at(BFloat16* columns, int64_t q0, int64_t dim) {
    return {columns + q0 * padded(dim), padded(dim)};
  }
  static TilePanels rows_at(BFloat16* rows, int64_t q0, int64_t count, int64_t dim) {
    return {rows + q0 * padded(dim), round_up(count, kTilePair)};
  }

  // to = rows * columns where some query of the tile sees some key of it.
  void multiply_seen(const TileRows& rows, const TilePanels& columns, const Visible& visible,
                     const Matrix<float>& to) {
    for (int64_t i = 0; i < visible.queries; i += kTilePair) {
      const TilePanels panel{columns.at(0, i), columns.depth};
      const Range seen = visible.keys_of_group(i, kTilePair);
      for (int64_t r = round_down(seen.begin, kTilePair); r < seen.end; r += kTilePair) {
        multiply_tiles<false>(tiles_, {rows.row(r), rows.stride}, panel, columns.depth,
                              to.row(r) + i, to.stride);
      }
    }
  }

  // The bits of P^T and dS^T, rounded, for one vector of queries of one key; zero where the query
  // does not see the key.
  struct RoundedPair {
    WordVec p;
    WordVec ds;
  };
  template <bool kLogits>
  FLASHTILE_INLINE RoundedPair differentiate_vector(int64_t key, int64_t i, const Range& seen,
                                                    const Statistics<float>& statistics) {
    constexpr int kWidth = kLanes<float>;
    if (seen.begin >= i + kWidth || seen.end <= i) return {WordVec{}, WordVec{}};
    Vec<float> p, ds;
    if constexpr (kLogits) {
      const Differentials d = differentials(key, i, statistics);
      p = d.p;
      ds = d.ds;
      if (scores_.wants_slope_gradient()) add_slope_gradient(d.dlogit, key, i, seen);
      tile_.scores.keep_gradient(key, i, masked_lanes<float>(d.dlogit, lanes_in<float>(seen, i)));
    } else {
      const Vec<float> above = load(tile_.s.row(key) + i) - load(statistics.base + i);
      p = exp2<float, kExp2Degree<BFloat16>>(above * scale_.log2 - load(statistics.rest + i));
      ds = p * (load(tile_.dp.row(key) + i) - load(statistics.delta + i));
    }
    if (seen.begin <= i && seen.end >= i + kWidth) return {bfloat16_bits(p), bfloat16_bits(ds)};
    const WordVec mask = bit_cast<WordVec>(lanes_in<float>(seen, i));
    return {bfloat16_bits(p) & mask, bfloat16_bits(ds) & mask};
  }

  using Differentials = typename TransposedScores<float, kBlockQ, kBlockK>::Differentials;
  FLASHTILE_INLINE Differentials differentials(int64_t key, int64_t i,
                                               const Statistics<float>& statistics) const {
    const Vec<float> logit = load(tile_.s.row(key) + i);
    const Vec<float> above = logit - load(statistics.base + i);
    const Vec<float> weight =
        exp2<float, kExp2Degree<BFloat16>>(above * scores_.factor() - load(statistics.rest + i));
    return tile_.scores.differentiate(scores_, key, i, logit, weight, load(tile_.dp.row(key) + i),
                                      load(statistics.delta + i));
  }
  void add_slope_gradient(Vec<float> dlogit, int64_t key, int64_t i, const Range& seen) {
    const IntVec<float> mask = lanes_in<float>(seen, i);
    const Vec<float> change =
        masked_lanes<float>(dlogit, mask) * HeadScores<float>::distances(distance_ - key, 1.0f, i);
    slope_gradient_ -= static_cast<double>(sum_of_lanes<float>(change));
  }
  void multiply(int64_t q0, const BlockPlace& at, const Visible& visible) {
    multiply_scores(q0, at, visible);
    multiply_seen(tile_.v, columns_at(queries_.dout_columns, q0, dim_v_), visible, tile_.dp);
    tile_.scores.draw(scores_, at, visible);
  }

  // S^T, dP^T -> P^T, dS^T for two keys, for the queries that the products of their group read.
  template <bool kLogits>
  FLASHTILE_INLINE void differentiate_keys(int64_t key, const Visible& visible,
                                           const Statistics<float>& statistics) {
    const Range group =
        whole_tiles(visible.queries_of_group(round_down(key, kTilePair), kTilePair));
    const Range hidden = {0, 0};  // rows of padding: no query sees them
    const Range seen0 = key < visible.keys ? visible.queries_of(key) : hidden;
    const Range seen1 = key + 1 < visible.keys ? visible.queries_of(key + 1) : hidden;
    const TilePanels pairs = tile_.pairs_of(visible.keys);
    for (int64_t i = group.begin; i < group.end; i += kLanes<float>) {
      const RoundedPair low = differentiate_vector<kLogits>(key, i, seen0, statistics);
      const RoundedPair high = differentiate_vector<kLogits>(key + 1, i, seen1, statistics);
      store_shorts(tile_.p.row(key) + i, low.p);
      store_shorts(tile_.p.row(key + 1) + i, high.p);
      store_shorts(tile_.ds.row(key) + i, low.ds);
      store_shorts(tile_.ds.row(key + 1) + i, high.ds);
      const WordVec both = low.ds | (high.ds << 16);
      __builtin_memcpy(pairs.at(key, round_down(i, kTileSide)) + i % kTileSide * 2, &both,
                       sizeof both);
    }
  }

  // to[keys, dim] += left[keys, queries] * right[queries, dim].
  void accumulate_keys(const TileRows& left, const TilePanels& right, const Visible& visible,
                       const Matrix<float>& to) {
    for (int64_t d = 0; d < to.stride; d += kTilePair) {
      for (int64_t r = 0; r < visible.keys; r += kTilePair) {
        const Range seen = whole_tiles(visible.queries_of_group(r, kTilePair));
        if (seen.empty()) continue;
        multiply_tiles<true>(tiles_, {left.row(r) + seen.begin, left.stride},
                             {right.at(seen.begin, d), right.depth}, seen.end - seen.begin,
                             to.row(r) + d, to.stride);
      }
    }
  }

  // dq^T[head_dim, queries] += k^T[head_dim, keys] * ds^T[keys, queries].
  void accumulate_queries(float* dq, const Visible& visible) {
    const TilePanels pairs = tile_.pairs_of(visible.keys);
    for (int64_t i = 0; i < visible.queries; i += kTilePair) {
      const int64_t queries = smaller_of(kTilePair, visible.queries - i);
      const Range seen = whole_tiles(visible.keys_of_group(i, queries));
      if (seen.empty()) continue;
      for (int64_t d = 0; d < padded(dim_); d += kTilePair) {
        multiply_tiles<true>(tiles_, {tile_.k_columns.row(d) + seen.begin, tile_.k_columns.stride},
                             {pairs.at(seen.begin, i), pairs.depth}, seen.end - seen.begin,
                             dq + d * kBlockQ + i, kBlockQ);
      }
    }
  }

  // The three sums without the rows that are masked: among them is an inf or NaN.
  void accumulate_seen(const TilePanels& q, const TilePanels& dout, const Visible& visible,
                       const Gradients& sum) const {
    for (int64_t key = 0; key < visible.keys; ++key) {
      const Range seen = visible.queries_of(key);
      const bool hides = scores_.hides_keys();
      add_products(tile_.p.row(key), seen, dout, sum.dv.stride, sum.dv.row(key), hides);
      add_products(tile_.ds.row(key), seen, q, sum.dk.stride, sum.dk.row(key), hides);
      for (int64_t d = 0; d < dim_; ++d) {
        const float k = value_of(tile_.k_columns.row(d)[key]);
        for (int64_t i = seen.begin; i < seen.end; ++i) {
          const float ds = value_of(tile_.ds.row(key)[i]);
          if (!hides || ds != 0) sum.dq[d * kBlockQ + i] += k * ds;
        }
      }
    }
  }

  const int64_t dim_, dim_v_;
  const Scale<float> scale_;
  const HeadScores<float>& scores_;
  const Queries queries_;
  const Tile tile_;
  int64_t distance_ = 0;  // of the first query and key of the block
  double slope_gradient_ = 0;
  Tiles tiles_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
