// Forward for bfloat16 on tiles: the algorithm of forward.h with the products of amx_tiles.h.
// Scores and sums are fp32; the weights are rounded to bfloat16 for the second product.
//
// A tile product meets every value with every weight, so a causal call whose values hold an inf or
// NaN goes through forward.h, which keeps it from the rows that do not see it.
#pragma once

#include "amx_pack.h"
#include "forward.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kAmxBlockQ = 128;
constexpr int64_t kAmxBlockK = 512;

// Like weigh_row, for scores without the factor: reads `seen` scores, writes `width` weights.
FLASHTILE_INLINE float weigh_tile_row(float* scores, int64_t seen, int64_t width, float factor,
                                      BFloat16* weights, RowState<float>& state) {
  constexpr int kWidth = kLanes<float>;
  const int64_t end = round_up(seen, kWidth);
  Vec<float> best = splat(-kInfinity<float>);
  for (int64_t i = seen; i < end; ++i) scores[i] = 0;
  for (int64_t i = 0; i < end; i += kWidth) {
    const Vec<float> scaled = load(scores + i) * factor;
    store(scores + i, scaled);
    if (i + kWidth <= seen) best = larger<float>(scaled, best);
  }
  float largest = largest_lane<float>(best);
  for (int64_t i = round_down(seen, kWidth); i < end; ++i) {
    if (i >= seen) scores[i] = -kInfinity<float>;
    if (scores[i] > largest) largest = scores[i];
  }
  if (state.largest > largest) largest = state.largest;
  const float base = largest == -kInfinity<float> ? 0.0f : largest;
  Vec<float> sum{};
  for (int64_t i = 0; i < end; i += kWidth) {
    const Vec<float> weight = exp2<float, kExp2Degree<BFloat16>>(load(scores + i) - base);
    sum += weight;
    write(weights + i, weight);
  }
  for (int64_t i = end; i < width; i += kWidth) write(weights + i, Vec<float>{});
  const float rescale = largest == state.largest
                            ? 1.0f
                            : exp2<float, kExp2Degree<BFloat16>>(splat(state.largest - base))[0];
  state.largest = largest;
  state.sum = state.sum * rescale + sum_of_lanes<float>(sum);
  return rescale;
}

struct AmxHead {
  BFloat16* keys;    // right operand [head_dim, keys]
  BFloat16* values;  // right operand [keys, head_dim], one per key block

  static AmxHead take(Arena& arena, int64_t max_k, int64_t dim) {
    AmxHead head;
    const int64_t numbers = round_up(max_k, kTilePair) * round_up(dim, kTilePair);
    head.keys = arena.take<BFloat16>(numbers);
    head.values = arena.take<BFloat16>(numbers);
    return head;
  }
};

struct AmxForwardTile {
  TileRows q;              // [kAmxBlockQ, head_dim]
  TileRows weights;        // [kAmxBlockQ, kAmxBlockK]
  Matrix<float> scores;    // [kAmxBlockQ, kAmxBlockK]
  Matrix<float> out;       // [kAmxBlockQ, head_dim], unnormalised
  RowState<float>* state;  // [kAmxBlockQ]

  static AmxForwardTile take(Arena& arena, int64_t dim) {
    const int64_t wide = round_up(dim, kTilePair);
    const int64_t stride = kAmxBlockK + kTilePair;  // no power of two: spreads cache sets
    AmxForwardTile tile;
    tile.q = {arena.take<BFloat16>(kAmxBlockQ * wide), wide};
    tile.weights = {arena.take<BFloat16>(kAmxBlockQ * stride), stride};
    tile.scores = {arena.take<float>(kAmxBlockQ * stride), stride};
    tile.out = {arena.take<float>(kAmxBlockQ * wide), wide};
    tile.state = arena.take<RowState<float>>(kAmxBlockQ);
    return tile;
  }
};

// One block of keys for one block of queries.
inline void attend_tiles(Tiles& tiles, const AmxForwardTile& tile, const TilePanels& keys,
                         const TilePanels& values, float factor, int64_t queries,
                         const Visible& visible) {
  for (int64_t key = 0; key < visible.keys; key += kTilePair) {
    const TilePanels columns{keys.at(0, key), keys.depth};
    for (int64_t r = round_down(visible.begin(key), kTilePair); r < queries; r += kTilePair) {
      multiply_tiles<false>(tiles, {tile.q.row(r), tile.q.stride}, columns, keys.depth,
                            tile.scores.row(r) + key, tile.scores.stride);
    }
  }
  for (int64_t r = 0; r < round_up(queries, kTilePair); ++r) {
    const int64_t group_end = visible.end(round_down(r, kTilePair) + kTilePair - 1);
    const float rescale =
        weigh_tile_row(tile.scores.row(r), r < queries ? visible.end(r) : 0,
                       round_up(group_end, kTilePair), factor, tile.weights.row(r), tile.state[r]);
    if (rescale != 1) scale_row(tile.out.row(r), tile.out.stride, rescale);
  }
  for (int64_t d = 0; d < tile.out.stride; d += kTilePair) {
    const TilePanels columns{values.at(0, d), values.depth};
    for (int64_t r = 0; r < queries; r += kTilePair) {
      const int64_t depth = round_up(visible.end(r + kTilePair - 1), kTilePair);
      multiply_tiles<true>(tiles, {tile.weights.row(r), tile.weights.stride}, columns, depth,
                           tile.out.row(r) + d, tile.out.stride);
    }
  }
}

class AmxForward {
 public:
  AmxForward(const ForwardParams& params, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        extent_(extent),
        threads_(threads),
        wide_(round_up(params.problem.head_dim, kTilePair)) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t tiles = static_cast<size_t>(threads) * tile_bytes(problem);
    const size_t head = head_bytes(problem, extent);
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    const int64_t room = larger_of(static_cast<int64_t>(kWaveBytes / head), threads);
    const Scratch own = {tiles + head, tiles + static_cast<size_t>(smaller_of(room, heads)) * head};
    const Scratch plain = Forward<BFloat16>::scratch(problem, extent, threads);
    return {own.minimum > plain.minimum ? own.minimum : plain.minimum,
            own.wanted > plain.wanted ? own.wanted : plain.wanted};
  }

  void run() {
    if (problem_.band.right == 0 && !values_are_finite()) {
      Forward<BFloat16>(params_, extent_, threads_).run();
      return;
    }
    const int64_t heads = problem_.batch * problem_.num_heads_kv;
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    const size_t fit = (params_.workspace_bytes - tiles) / head_bytes(problem_, extent_);
    const int64_t wave = fit < static_cast<size_t>(heads) ? static_cast<int64_t>(fit) : heads;
    const int64_t key_blocks = (extent_.max_k + kAmxBlockK - 1) / kAmxBlockK;
    const int64_t query_blocks = (extent_.max_q + kAmxBlockQ - 1) / kAmxBlockQ;
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = smaller_of(wave, heads - first);
      parallel_for(threads_, count * key_blocks, true, [&](int64_t task, int) {
        pack(first + task / key_blocks, task / key_blocks, task % key_blocks);
      });
      parallel_for(threads_, count * group * query_blocks, true, [&](int64_t task, int thread) {
        const int64_t slot = task / (group * query_blocks);
        const int64_t block = query_blocks - 1 - task % query_blocks;  // causal: longest first
        attend(first + slot, slot, task / query_blocks % group, block, thread);
      });
    }
  }

 private:
  static constexpr size_t kWaveBytes = size_t{64} << 20;

  static size_t tile_bytes(const Problem& problem) {
    Arena arena(nullptr);
    AmxForwardTile::take(arena, problem.head_dim);
    return arena.used();
  }
  static size_t head_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    AmxHead::take(arena, larger_of(extent.max_k, 1), problem.head_dim);
    return arena.used();
  }
  AmxHead packed(int64_t slot) const {
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    Arena arena(static_cast<char*>(params_.workspace) + tiles +
                static_cast<size_t>(slot) * head_bytes(problem_, extent_));
    return AmxHead::take(arena, larger_of(extent_.max_k, 1), problem_.head_dim);
  }
  TilePanels keys_of(const AmxHead& head, int64_t k0) const {
    return {head.keys + k0 * wide_, wide_};
  }
  TilePanels values_of(const AmxHead& head, int64_t k0, int64_t keys) const {
    return {head.values + k0 * wide_, round_up(keys, kTilePair)};
  }

  bool values_are_finite() const {
    bool finite = true;
    parallel_for(threads_, problem_.batch * problem_.num_heads_kv, true, [&](int64_t pair, int) {
      const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
      const Rows<const BFloat16> rows =
          key_rows<const BFloat16>(params_.v, seq, pair % problem_.num_heads_kv);
      if (!all_finite(rows, seq.k_len, problem_.head_dim)) {
        __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      }
    });
    return finite;
  }

  void pack(int64_t pair, int64_t slot, int64_t block) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head = pair % problem_.num_heads_kv;
    const int64_t k0 = block * kAmxBlockK;
    const int64_t keys = smaller_of(kAmxBlockK, seq.k_len - k0);
    if (keys <= 0) return;
    const AmxHead to = packed(slot);
    const int64_t dim = problem_.head_dim;
    pack_right_transposed(key_rows<const BFloat16>(params_.k, seq, head).from(k0), keys, dim,
                          keys_of(to, k0));
    pack_right(key_rows<const BFloat16>(params_.v, seq, head).from(k0), keys, dim,
               values_of(to, k0, keys));
  }

  void attend(int64_t pair, int64_t slot, int64_t in_group, int64_t block, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    const int64_t head = pair % problem_.num_heads_kv * group + in_group;
    const int64_t q0 = block * kAmxBlockQ;
    const int64_t queries = smaller_of(kAmxBlockQ, seq.q_len - q0);
    if (queries <= 0) return;
    const int64_t dim = problem_.head_dim;
    Arena arena(static_cast<char*>(params_.workspace) +
                static_cast<size_t>(thread) * tile_bytes(problem_));
    const AmxForwardTile tile = AmxForwardTile::take(arena, dim);
    const AmxHead from = packed(slot);
    pack_left(query_rows<const BFloat16>(params_.q, seq, head).from(q0), queries, dim, tile.q);
    for (int64_t r = 0; r < round_up(queries, kTilePair); ++r) {
      tile.state[r] = RowState<float>{};
      for (int64_t d = 0; d < wide_; ++d) tile.out.row(r)[d] = 0;
    }
    Tiles tiles;
    const int64_t end = visible_keys(problem_, seq, q0, 0, seq.k_len).end(queries - 1);
    for (int64_t k0 = 0; k0 < end; k0 += kAmxBlockK) {
      const int64_t keys = smaller_of(kAmxBlockK, seq.k_len - k0);
      attend_tiles(tiles, tile, keys_of(from, k0), values_of(from, k0, keys),
                   problem_.softmax_scale * kLog2E<float>, queries,
                   visible_keys(problem_, seq, q0, k0, keys));
    }
    const Rows<BFloat16> out = query_rows<BFloat16>(params_.out, seq, head).from(q0);
    float* lse = row_values(params_.lse, seq, head);
    for (int64_t r = 0; r < queries; ++r) {
      finish_row(tile.out.row(r), tile.state[r], dim, out.row(r),
                 lse == nullptr ? nullptr : lse + q0 + r);
    }
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const int64_t wide_;  // head_dim in whole tiles
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
