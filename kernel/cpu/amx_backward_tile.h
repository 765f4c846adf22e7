// One tile of the bfloat16 backward pass: the equations of backward_tile.h with the products of
// amx_tiles.h. P and dS are rounded to bfloat16; dQ is accumulated transposed, dQ^T += K^T dS^T, so
// that dS^T is a right operand without another transposition.
#pragma once

#include "amx_pack.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// A block of queries as right operands, and what belongs to each query (padded to 32).
struct AmxQueryBlock {
  TilePanels q_columns;     // [head_dim, queries]
  TilePanels dout_columns;  // [head_dim, queries]
  TilePanels q_rows;        // [queries, head_dim]
  TilePanels dout_rows;     // [queries, head_dim]
  const float* lse;         // base 2; +inf for rows without keys and padding
  const float* delta;       // dot(out, dout) - dlse
  int64_t queries;
};

// A block of keys as left operands.
struct AmxKeyBlock {
  TileRows k;          // [keys, head_dim]
  TileRows v;          // [keys, head_dim]
  TileRows k_columns;  // [head_dim, keys]
};

struct AmxBackwardTile {
  Matrix<float> s;   // [keys, queries]: S^T
  Matrix<float> dp;  // [keys, queries]: dP^T
  TileRows p;        // [keys, queries]: P^T
  TileRows ds;       // [keys, queries]: dS^T
  BFloat16* pairs;   // dS^T as right operand [keys, queries]

  TilePanels pairs_of(int64_t keys) const { return {pairs, round_up(keys, kTilePair)}; }
};

struct AmxGradients {
  Matrix<float> dq;  // transposed: [head_dim, queries of the block]
  Matrix<float> dk;  // [keys of the block, head_dim]
  Matrix<float> dv;
};

// to = rows * columns where some query of the tile sees some key of it.
inline void multiply_seen(Tiles& tiles, const TileRows& rows, const TilePanels& columns,
                          int64_t queries, const Visible& visible, const Matrix<float>& to) {
  for (int64_t i = 0; i < queries; i += kTilePair) {
    const TilePanels panel{columns.at(0, i), columns.depth};
    const int64_t end = visible.end(i + kTilePair - 1);
    for (int64_t r = 0; r < end; r += kTilePair) {
      multiply_tiles<false>(tiles, {rows.row(r), rows.stride}, panel, columns.depth, to.row(r) + i,
                            to.stride);
    }
  }
}

// The bits of P^T and dS^T, rounded, for one vector of queries of one key; zero where the query
// does not see the key.
struct RoundedPair {
  WordVec p;
  WordVec ds;
};
FLASHTILE_INLINE RoundedPair differentiate_vector(const AmxBackwardTile& tile, int64_t key,
                                                  int64_t i, int64_t begin, float factor,
                                                  const AmxQueryBlock& block) {
  if (begin >= i + kLanes<float>) return {WordVec{}, WordVec{}};
  const Vec<float> p =
      exp2<float, kExp2Degree<BFloat16>>(load(tile.s.row(key) + i) * factor - load(block.lse + i));
  const Vec<float> ds = p * (load(tile.dp.row(key) + i) - load(block.delta + i));
  const WordVec seen =
      bit_cast<WordVec>(lane_numbers<float>() >= static_cast<int32_t>(larger_of(begin - i, 0)));
  return {bfloat16_bits(p) & seen, bfloat16_bits(ds) & seen};
}

// S^T, dP^T -> P^T, dS^T for two keys, from the first query that the products of their group read.
FLASHTILE_INLINE void differentiate_keys(const AmxBackwardTile& tile, int64_t key, float factor,
                                         const AmxQueryBlock& block, const Visible& visible) {
  const int64_t group = round_down(key, kTilePair);
  const int64_t hidden = block.queries;  // rows of padding: no query sees them
  const int64_t begin0 = key < visible.keys ? visible.begin(key) : hidden;
  const int64_t begin1 = key + 1 < visible.keys ? visible.begin(key + 1) : hidden;
  const TilePanels pairs = tile.pairs_of(visible.keys);
  for (int64_t i = round_down(visible.begin(group), kTilePair);
       i < round_up(block.queries, kTilePair); i += kLanes<float>) {
    const RoundedPair low = differentiate_vector(tile, key, i, begin0, factor, block);
    const RoundedPair high = differentiate_vector(tile, key + 1, i, begin1, factor, block);
    store_shorts(tile.p.row(key) + i, low.p);
    store_shorts(tile.p.row(key + 1) + i, high.p);
    store_shorts(tile.ds.row(key) + i, low.ds);
    store_shorts(tile.ds.row(key + 1) + i, high.ds);
    const WordVec both = low.ds | (high.ds << 16);
    __builtin_memcpy(pairs.at(key, round_down(i, kTileSide)) + i % kTileSide * 2, &both,
                     sizeof both);
  }
}

// to[keys, head_dim] += left[keys, queries] * right[queries, head_dim].
inline void accumulate_key_tiles(Tiles& tiles, const TileRows& left, const TilePanels& right,
                                 int64_t queries, const Visible& visible, const Matrix<float>& to) {
  for (int64_t d = 0; d < to.stride; d += kTilePair) {
    for (int64_t r = 0; r < visible.keys; r += kTilePair) {
      const int64_t begin = round_down(visible.begin(r), kTilePair);
      if (begin >= queries) break;
      multiply_tiles<true>(tiles, {left.row(r) + begin, left.stride},
                           {right.at(begin, d), right.depth}, round_up(queries, kTilePair) - begin,
                           to.row(r) + d, to.stride);
    }
  }
}

inline void differentiate_tiles(Tiles& tiles, const AmxBackwardTile& tile, const AmxKeyBlock& kv,
                                const AmxQueryBlock& block, float factor, const Visible& visible,
                                const AmxGradients& sum) {
  multiply_seen(tiles, kv.k, block.q_columns, block.queries, visible, tile.s);
  multiply_seen(tiles, kv.v, block.dout_columns, block.queries, visible, tile.dp);
  for (int64_t key = 0; key < round_up(visible.keys, kTilePair); key += 2) {
    differentiate_keys(tile, key, factor, block, visible);
  }
  accumulate_key_tiles(tiles, tile.p, block.dout_rows, block.queries, visible, sum.dv);
  accumulate_key_tiles(tiles, tile.ds, block.q_rows, block.queries, visible, sum.dk);
  const TilePanels pairs = tile.pairs_of(visible.keys);
  for (int64_t i = 0; i < block.queries; i += kTilePair) {
    const int64_t depth =
        round_up(visible.end(smaller_of(i + kTilePair, block.queries) - 1), kTilePair);
    for (int64_t d = 0; d < kv.k.stride; d += kTilePair) {
      multiply_tiles<true>(tiles, {kv.k_columns.row(d), kv.k_columns.stride},
                           {pairs.at(0, i), pairs.depth}, depth, sum.dq.row(d) + i, sum.dq.stride);
    }
  }
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
