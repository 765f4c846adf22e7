// The products of the forward pass in vectors of fp32 or fp64: every storage format is widened
// while it is packed. Tiles at the edge of the mask are trimmed per panel of keys and per group of
// rows: almost nothing is computed only to be masked.
#pragma once

#include "arena.h"
#include "pack.h"
#include "scores.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// T: of q and out. K: of k and v.
template <class T, class K = T>
class VectorForward {
 public:
  using Storage = T;
  using KeyStorage = K;
  using C = Compute<T>;
  // Tile sizes: the scores (96 KB in fp32), the packed key block and value block stay in a cache of
  // 512 KB. Both are multiples of every register tile.
  static constexpr int64_t kBlockQ = 96;
  static constexpr int64_t kBlockK = 256;

  // The packed keys and values of one key/value head.
  struct Head {
    C* keys;          // [panels][head_dim][kPanel]
    C* values;        // per key block [head_dim_v panels][keys of the block][kPanel]
    uint8_t* finite;  // per key block: no value is inf or NaN

    static Head take(Arena& arena, int64_t max_k, const Problem& problem) {
      Head head;
      head.keys = arena.take<C>(round_up(max_k, kPanel<C>) * problem.head_dim);
      head.values = arena.take<C>(max_k * round_up(problem.head_dim_v, kPanel<C>));
      head.finite = arena.take<uint8_t>(max_k / kBlockK + 1);
      return head;
    }
    template <class Source>
    void pack(const Problem& problem, int64_t k0, int64_t count, Source k, Source v) const {
      const int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
      pack_transposed(k, count, dim, C{1}, keys + k0 * dim);
      finite[k0 / kBlockK] = pack_rows(v, count, dim_v, values + k0 * round_up(dim_v, kPanel<C>));
    }
  };

  struct Tile {
    Matrix<C> q;         // [kBlockQ, head_dim], negated when softmax_scale is negative
    Matrix<C> scores;    // [kBlockQ, kBlockK], then the weights
    Matrix<C> out;       // [kBlockQ, head_dim_v], unnormalised
    RowState<C>* state;  // [kBlockQ]
    uint8_t* kept;       // [kBlockQ, kBlockK] with dropout: DropMask

    static Tile take(Arena& arena, const Problem& problem, const Scores& scores) {
      const int64_t q_stride = round_up(problem.head_dim, kLanes<C>);
      const int64_t score_stride = kBlockK + 2 * kLanes<C>;  // no power of two: spreads cache sets
      const int64_t out_stride = round_up(problem.head_dim_v, kPanel<C>);
      Tile tile;
      tile.q = {arena.take<C>(kBlockQ * q_stride), q_stride};
      tile.scores = {arena.take<C>(kBlockQ * score_stride), score_stride};
      tile.out = {arena.take<C>(kBlockQ * out_stride), out_stride};
      tile.state = arena.take<RowState<C>>(kBlockQ);
      tile.kept = scores.dropout.exists() ? arena.take<uint8_t>(kBlockQ * kBlockK) : nullptr;
      return tile;
    }
  };

  VectorForward(const Problem& problem, const HeadScores<C>& scores, const Tile& tile)
      : dim_(problem.head_dim), scale_(problem), scores_(scores), tile_(tile) {}

  void begin(Rows<const T> q, int64_t queries) {
    copy_rows(q, queries, dim_, scale_.sign, tile_.q);
    for (int64_t r = 0; r < round_up(queries, kTileRows); ++r) {
      tile_.state[r] = RowState<C>{};
      for (int64_t d = 0; d < tile_.out.stride; ++d) tile_.out.row(r)[d] = 0;
    }
  }

  // One block of keys, packed from key k0 of `head` on.
  void attend(const Head& head, int64_t k0, const BlockPlace& at, const Visible& visible) {
    multiply_scores(head.keys + k0 * dim_, visible);
    for (int64_t r = 0; r < visible.queries; ++r) {
      const Range width = visible.keys_of_group(round_down(r, kTileRows), kTileRows);
      if (width.empty()) continue;
      C* const row = tile_.scores.row(r);
      const Range seen = visible.keys_of(r);
      if (scores_.changes_logits()) scores_.to_logits(row, seen, at.query + r, at.key);
      const C factor =
          weigh_row<C, kExp2Degree<T>>(row, seen, width, scores_.factor(), row, tile_.state[r]);
      if (factor != 1) scale_row(tile_.out.row(r), tile_.out.stride, factor);
    }
    if (scores_.drops().exists()) drop(at, visible);
    const C* values = head.values + k0 * tile_.out.stride;
    if (head.finite[k0 / kBlockK] != 0 || (visible.all() && !scores_.hides_keys())) {
      accumulate_values<kTileRows>(values, visible);
    } else if (scores_.hides_keys()) {
      accumulate_weighed_values(values, visible);
    } else {
      accumulate_values<1>(values, visible);
    }
  }

  const C* out(int64_t r) const { return tile_.out.row(r); }
  const RowState<C>& state(int64_t r) const { return tile_.state[r]; }

 private:
  void drop(const BlockPlace& at, const Visible& visible) const {
    scores_.drops().fill(at.query, visible.queries, at.key, visible.keys, kBlockK, tile_.kept);
    for (int64_t r = 0; r < visible.queries; ++r)
      drop_weights(tile_.scores.row(r), visible.keys_of(r), tile_.kept + r * kBlockK);
  }

  // scores = q k^T where some row of the group sees some key of the panel.
  void multiply_scores(const C* keys, const Visible& visible) const {
    for (int64_t key = 0; key < visible.keys; key += kPanel<C>) {
      const Range seen = visible.queries_of_group(key, kPanel<C>);
      for (int64_t r = round_down(seen.begin, kTileRows); r < seen.end; r += kTileRows) {
        multiply_tile<C, kTileRows, Left::kRowMajor, false>(
            tile_.q.row(r), tile_.q.stride, keys + key * dim_, dim_, tile_.scores.row(r) + key,
            tile_.scores.stride);
      }
    }
  }

  // out += weights * values. kRows = 1 reads exactly the values that a row sees, so that an inf or
  // NaN among the others does not meet its zero weight.
  template <int kRows>
  void accumulate_values(const C* values, const Visible& visible) const {
    for (int64_t d = 0; d < tile_.out.stride; d += kPanel<C>) {
      for (int64_t r = 0; r < visible.queries; r += kRows) {
        const Range seen = visible.keys_of_group(r, kRows);
        if (seen.empty()) continue;
        multiply_tile<C, kRows, Left::kRowMajor, true>(
            tile_.scores.row(r) + seen.begin, tile_.scores.stride,
            values + d * visible.keys + seen.begin * kPanel<C>, seen.end - seen.begin,
            tile_.out.row(r) + d, tile_.out.stride);
      }
    }
  }

  // The same without the values whose weight is 0: a key may be hidden, and its value no number.
  void accumulate_weighed_values(const C* values, const Visible& visible) const {
    for (int64_t r = 0; r < visible.queries; ++r) {
      const Range seen = visible.keys_of(r);
      const C* const weights = tile_.scores.row(r);
      for (int64_t d = 0; d < tile_.out.stride; d += kPanel<C>) {
        C* const to = tile_.out.row(r) + d;
        for (int64_t j = seen.begin; j < seen.end; ++j) {
          const C* const from = values + d * visible.keys + j * kPanel<C>;
          for (int64_t n = 0; weights[j] != 0 && n < kPanel<C>; ++n) to[n] += weights[j] * from[n];
        }
      }
    }
  }

  const int64_t dim_;
  const Scale<C> scale_;
  const HeadScores<C>& scores_;
  const Tile tile_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
