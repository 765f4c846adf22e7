// The products of decoding for bfloat16 on tiles (tiles.h), for a key/value head that has many
// query rows: a chunk of keys and values is packed once for all of them. Scores and sums are fp32;
// the weights are rounded to bfloat16, as in forward_tiles.h.
#pragma once

#include "decode_vector.h"
#include "tiles_pack.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

class TileDecode {
 public:
  using Storage = BFloat16;
  using KeyStorage = BFloat16;

  struct Tile {
    TileRows q;              // [rows, head_dim]
    TileRows weights;        // [rows, kDecodeKeys]
    TilePanels keys;         // right operand [head_dim, kDecodeKeys]
    TilePanels values;       // right operand [kDecodeKeys, head_dim_v]
    Matrix<float> scores;    // [rows, kDecodeKeys]
    Matrix<float> out;       // [rows, head_dim_v], unnormalised
    RowState<float>* state;  // [rows]
    uint8_t* kept;           // [2, kDecodeKeys] with dropout: DropMask

    static Tile take(Arena& arena, int64_t rows, const Problem& problem, const Scores& scores) {
      const int64_t whole = round_up(rows, kTileSide);
      const int64_t wide = round_up(problem.head_dim, kTilePair);
      const int64_t wide_v = round_up(problem.head_dim_v, kTilePair);
      Tile tile;
      tile.q = {arena.take<BFloat16>(whole * wide), wide};
      tile.weights = {arena.take<BFloat16>(whole * kDecodeKeys), kDecodeKeys};
      tile.keys = {arena.take<BFloat16>(kDecodeKeys * wide), wide};
      // No power of two: the panels of a row would share a set of the cache.
      const int64_t depth = kDecodeKeys + kTilePair;
      tile.values = {arena.take<BFloat16>(depth * wide_v), depth};
      tile.scores = {arena.take<float>(whole * kDecodeKeys), kDecodeKeys};
      tile.out = {arena.take<float>(whole * wide_v), wide_v};
      tile.state = arena.take<RowState<float>>(rows);
      tile.kept = scores.dropout.exists() ? arena.take<uint8_t>(2 * kDecodeKeys) : nullptr;
      return tile;
    }
  };

  TileDecode(const Problem& problem, const GroupScores<float>& scores, int64_t rows,
             const Tile& tile)
      : scores_(scores),
        dim_(problem.head_dim),
        dim_v_(problem.head_dim_v),
        group_(problem.group()),
        rows_(rows),
        scale_(problem),
        factor_(scores.factor()),
        tile_(tile) {
    for (int64_t r = 0; r < round_up(rows, kTileSide); ++r) {
      clear(tile_.q.row(r), tile_.q.stride);
      clear(tile_.weights.row(r), tile_.weights.stride);
      clear(tile_.out.row(r), tile_.out.stride);
    }
  }

  void begin(int64_t r, const BFloat16* query) {
    __builtin_memcpy(tile_.q.row(r), query, static_cast<size_t>(dim_) * sizeof(BFloat16));
    if (scale_.sign < 0) flip_signs(tile_.q.row(r), dim_);
    tile_.state[r] = RowState<float>{};
  }

  // One chunk, from key k0 of the sequence on.
  template <class Source>
  void attend(const Source& keys, const Source& values, int64_t k0, const Visible& visible) {
    const Range any = visible.keys_of_group(0, visible.queries);
    const int64_t first = round_down(any.begin, kTilePair), count = any.end - first;
    const Visible seen = visible.block(0, visible.queries, first, count);
    const Source v = values.from(first);
    score(keys.from(first), v, count);
    weigh(k0 + first, seen);
    pack_right(v, count, dim_v_, tile_.values);
    if ((seen.all() && !scores_.hides_keys()) || all_finite(v, count, dim_v_)) {
      accumulate_values(round_up(count, kTilePair));
    } else {
      for (int64_t r = 0; r < rows_; ++r) {
        add_products(tile_.weights.row(r), seen.keys_of(r / group_), tile_.values, tile_.out.stride,
                     tile_.out.row(r), scores_.hides_keys());
      }
    }
  }

  const float* out(int64_t r) const { return tile_.out.row(r); }
  const RowState<float>& state(int64_t r) const { return tile_.state[r]; }

 private:
  template <class Number>
  static void clear(Number* row, int64_t count) {
    __builtin_memset(row, 0, static_cast<size_t>(count) * sizeof(Number));
  }

  // Scores to weights.
  void weigh(int64_t k0, const Visible& visible) {
    const Range width = whole_tiles({0, visible.keys});
    for (int64_t r = 0; r < rows_; ++r) {
      float* const row = tile_.scores.row(r);
      const Range seen = visible.keys_of(r / group_);
      if (scores_.changes_logits()) scores_.of_row(r).to_logits(row, seen, r / group_, k0);
      const float factor = weigh_row<float, kExp2Degree<BFloat16>>(
          row, seen, width, factor_, tile_.weights.row(r), tile_.state[r]);
      if (factor != 1) scale_row(tile_.out.row(r), tile_.out.stride, factor);
      if (scores_.drops()) drop(r, k0, seen);
    }
  }
  void drop(int64_t r, int64_t k0, const Range& seen) {
    uint8_t* const kept = tile_.kept;
    scores_.of_row(r).drops().fill_row(r / group_, k0, seen.end, kept, kept + kDecodeKeys);
    drop_weights(tile_.weights.row(r), seen, kept);
  }

  // Scores of `count` keys; asks for the values that come after them.
  template <class Source>
  void score(const Source& keys, const Source& values, int64_t count) {
    for (int64_t j = 0; j < count; j += kTilePair) {
      const int64_t end = smaller_of(j + kTilePair, count);
      prefetch(keys, {end, smaller_of(end + kTilePair, count)}, dim_);
      prefetch(values, {j, end}, dim_v_);
      const TilePanels columns{tile_.keys.at(0, j), tile_.keys.depth};
      pack_right_transposed(keys.from(j), end - j, dim_, columns);
      for (int64_t r = 0; r < rows_; r += kTileSide) {
        multiply_tile_row<false>(tiles_, {tile_.q.row(r), tile_.q.stride}, columns, columns.depth,
                                 tile_.scores.row(r) + j, tile_.scores.stride);
      }
    }
  }

  void accumulate_values(int64_t keys) {
    for (int64_t d = 0; d < tile_.out.stride; d += kTilePair) {
      for (int64_t r = 0; r < rows_; r += kTileSide) {
        multiply_tile_row<true>(tiles_, {tile_.weights.row(r), tile_.weights.stride},
                                {tile_.values.at(0, d), tile_.values.depth}, keys,
                                tile_.out.row(r) + d, tile_.out.stride);
      }
    }
  }

  const GroupScores<float> scores_;
  const int64_t dim_, dim_v_, group_, rows_;
  const Scale<float> scale_;
  const float factor_;
  const Tile tile_;
  Tiles tiles_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
