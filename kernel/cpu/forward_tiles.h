// The products of the forward pass for bfloat16 on tiles (tiles.h). Scores and sums are fp32; the
// weights are rounded to bfloat16 for the second product.
#pragma once

#include "arena.h"
#include "scores.h"
#include "softmax.h"
#include "tiles_pack.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

class TileForward {
 public:
  using Storage = BFloat16;
  using KeyStorage = BFloat16;
  static constexpr int64_t kBlockQ = 128;
  static constexpr int64_t kBlockK = 512;

  // The packed keys and values of one key/value head.
  struct Head {
    BFloat16* keys;    // right operand [head_dim, keys]
    BFloat16* values;  // right operand [keys, head_dim_v], one per key block
    uint8_t* finite;   // per key block: no value is inf or NaN

    static Head take(Arena& arena, int64_t max_k, const Problem& problem) {
      const int64_t rows = round_up(max_k, kTilePair);
      Head head;
      head.keys = arena.take<BFloat16>(rows * round_up(problem.head_dim, kTilePair));
      head.values = arena.take<BFloat16>(rows * round_up(problem.head_dim_v, kTilePair));
      head.finite = arena.take<uint8_t>(max_k / kBlockK + 1);
      return head;
    }
    template <class Source>
    void pack(const Problem& problem, int64_t k0, int64_t count, Source k, Source v) const {
      pack_right_transposed(k, count, problem.head_dim, keys_of(k0, problem.head_dim));
      pack_right(v, count, problem.head_dim_v, values_of(k0, count, problem.head_dim_v));
      finite[k0 / kBlockK] = all_finite(v, count, problem.head_dim_v);
    }
    TilePanels keys_of(int64_t k0, int64_t dim) const {
      const int64_t wide = round_up(dim, kTilePair);
      return {keys + k0 * wide, wide};
    }
    TilePanels values_of(int64_t k0, int64_t count, int64_t dim) const {
      return {values + k0 * round_up(dim, kTilePair), round_up(count, kTilePair)};
    }
  };

  struct Tile {
    TileRows q;              // [kBlockQ, head_dim]
    TileRows weights;        // [kBlockQ, kBlockK]
    Matrix<float> scores;    // [kBlockQ, kBlockK]
    Matrix<float> out;       // [kBlockQ, head_dim_v], unnormalised
    RowState<float>* state;  // [kBlockQ]
    uint8_t* kept;           // [kBlockQ, kBlockK] with dropout: DropMask

    static Tile take(Arena& arena, const Problem& problem, const Scores& scores) {
      const int64_t wide = round_up(problem.head_dim, kTilePair);
      const int64_t wide_v = round_up(problem.head_dim_v, kTilePair);
      const int64_t stride = kBlockK + kTilePair;  // no power of two: spreads cache sets
      Tile tile;
      tile.q = {arena.take<BFloat16>(kBlockQ * wide), wide};
      tile.weights = {arena.take<BFloat16>(kBlockQ * stride), stride};
      tile.scores = {arena.take<float>(kBlockQ * stride), stride};
      tile.out = {arena.take<float>(kBlockQ * wide_v), wide_v};
      tile.state = arena.take<RowState<float>>(kBlockQ);
      tile.kept = scores.dropout.exists() ? arena.take<uint8_t>(kBlockQ * kBlockK) : nullptr;
      return tile;
    }
  };

  TileForward(const Problem& problem, const HeadScores<float>& scores, const Tile& tile)
      : dim_(problem.head_dim),
        dim_v_(problem.head_dim_v),
        scale_(problem),
        scores_(scores),
        tile_(tile) {}

  void begin(Rows<const BFloat16> q, int64_t queries) {
    pack_left(q, queries, dim_, tile_.q);
    const int64_t rows = round_up(queries, kTilePair);
    if (scale_.sign < 0) flip_signs(tile_.q.data, rows * tile_.q.stride);
    for (int64_t r = 0; r < rows; ++r) {
      tile_.state[r] = RowState<float>{};
      for (int64_t d = 0; d < tile_.out.stride; ++d) tile_.out.row(r)[d] = 0;
    }
  }

  // One block of keys, packed from key k0 of `head` on.
  void attend(const Head& head, int64_t k0, const BlockPlace& at, const Visible& visible) {
    multiply_scores(head.keys_of(k0, dim_), visible);
    for (int64_t r = 0; r < visible.queries; ++r) {
      const Range width = whole_tiles(visible.keys_of_group(round_down(r, kTilePair), kTilePair));
      if (width.empty()) continue;
      float* const row = tile_.scores.row(r);
      const Range seen = visible.keys_of(r);
      if (scores_.changes_logits()) scores_.to_logits(row, seen, at.query + r, at.key);
      const float rescale = weigh_row<float, kExp2Degree<BFloat16>>(
          row, seen, width, scores_.factor(), tile_.weights.row(r), tile_.state[r]);
      if (rescale != 1) scale_row(tile_.out.row(r), tile_.out.stride, rescale);
    }
    if (scores_.drops().exists()) drop(at, visible);
    const TilePanels values = head.values_of(k0, visible.keys, dim_v_);
    if (head.finite[k0 / kBlockK] != 0 || (visible.all() && !scores_.hides_keys())) {
      accumulate_values(values, visible);
    } else {
      accumulate_seen_values(values, visible);
    }
  }

  const float* out(int64_t r) const { return tile_.out.row(r); }
  const RowState<float>& state(int64_t r) const { return tile_.state[r]; }

 private:
  void drop(const BlockPlace& at, const Visible& visible) const {
    scores_.drops().fill(at.query, visible.queries, at.key, visible.keys, kBlockK, tile_.kept);
    for (int64_t r = 0; r < visible.queries; ++r)
      drop_weights(tile_.weights.row(r), visible.keys_of(r), tile_.kept + r * kBlockK);
  }

  void multiply_scores(const TilePanels& keys, const Visible& visible) {
    for (int64_t key = 0; key < visible.keys; key += kTilePair) {
      const TilePanels columns{keys.at(0, key), keys.depth};
      const Range seen = visible.queries_of_group(key, kTilePair);
      for (int64_t r = round_down(seen.begin, kTilePair); r < seen.end; r += kTilePair) {
        multiply_tiles<false>(tiles_, {tile_.q.row(r), tile_.q.stride}, columns, keys.depth,
                              tile_.scores.row(r) + key, tile_.scores.stride);
      }
    }
  }

  void accumulate_values(const TilePanels& values, const Visible& visible) {
    for (int64_t d = 0; d < tile_.out.stride; d += kTilePair) {
      for (int64_t r = 0; r < visible.queries; r += kTilePair) {
        const Range seen = whole_tiles(visible.keys_of_group(r, kTilePair));
        if (seen.empty()) continue;
        multiply_tiles<true>(tiles_, {tile_.weights.row(r) + seen.begin, tile_.weights.stride},
                             {values.at(seen.begin, d), values.depth}, seen.end - seen.begin,
                             tile_.out.row(r) + d, tile_.out.stride);
      }
    }
  }

  // The same without the values that a row does not see: among them is an inf or NaN.
  void accumulate_seen_values(const TilePanels& values, const Visible& visible) {
    for (int64_t r = 0; r < visible.queries; ++r) {
      add_products(tile_.weights.row(r), visible.keys_of(r), values, tile_.out.stride,
                   tile_.out.row(r), scores_.hides_keys());
    }
  }

  const int64_t dim_, dim_v_;
  const Scale<float> scale_;
  const HeadScores<float>& scores_;
  const Tile tile_;
  Tiles tiles_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
