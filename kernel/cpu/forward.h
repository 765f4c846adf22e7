// Forward: out = softmax(scale q k^T) v and its log-sum-exp (FlashAttention-2, Algorithm 1).
//
// Heads are taken in waves that fit the workspace. Phase 1 packs the keys (transposed) and values
// of the wave's key/value heads once; phase 2 runs one task per (key/value head, query head of its
// group, block of queries) over all key blocks, so packing hides every layout and storage format,
// and the heads of a group share it. Causal tiles are trimmed per panel and per row group: almost
// nothing is computed only to be masked.
#pragma once

#include "arena.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// Tile sizes: the scores (96 KB in fp32), the packed key block and value block stay in a cache of
// 512 KB. Both are multiples of every register tile.
constexpr int64_t kBlockQ = 96;
constexpr int64_t kBlockK = 256;

// The packed keys and values of one key/value head.
template <class C>
struct PackedHead {
  C* keys;          // [panels][head_dim][kPanel]
  C* values;        // per key block [head_dim panels][keys of the block][kPanel]
  uint8_t* finite;  // per key block: no value is inf or NaN

  static PackedHead take(Arena& arena, int64_t max_k, int64_t dim) {
    PackedHead head;
    head.keys = arena.take<C>(round_up(max_k, kPanel<C>) * dim);
    head.values = arena.take<C>(max_k * round_up(dim, kPanel<C>));
    head.finite = arena.take<uint8_t>(max_k / kBlockK + 1);
    return head;
  }
};

template <class C>
struct ForwardTile {
  Matrix<C> q;         // [kBlockQ, head_dim], times softmax_scale * log2(e)
  Matrix<C> scores;    // [kBlockQ, kBlockK], then the weights
  Matrix<C> out;       // [kBlockQ, head_dim], unnormalised
  RowState<C>* state;  // [kBlockQ]

  static ForwardTile take(Arena& arena, int64_t dim) {
    ForwardTile tile;
    const int64_t q_stride = round_up(dim, kLanes<C>);
    const int64_t score_stride = kBlockK + 2 * kLanes<C>;  // no power of two: spreads cache sets
    const int64_t out_stride = round_up(dim, kPanel<C>);
    tile.q = {arena.take<C>(kBlockQ * q_stride), q_stride};
    tile.scores = {arena.take<C>(kBlockQ * score_stride), score_stride};
    tile.out = {arena.take<C>(kBlockQ * out_stride), out_stride};
    tile.state = arena.take<RowState<C>>(kBlockQ);
    return tile;
  }
};

// scores = q k^T where some row of the group sees the key.
template <class C>
void multiply_scores(const ForwardTile<C>& tile, const C* keys, int64_t dim, int64_t queries,
                     const Visible& visible) {
  for (int64_t key = 0; key < visible.keys; key += kPanel<C>) {
    for (int64_t r = round_down(visible.begin(key), kTileRows); r < queries; r += kTileRows) {
      multiply_tile<C, kTileRows, Left::kRowMajor, false>(
          tile.q.row(r), tile.q.stride, keys + key * dim, dim, tile.scores.row(r) + key,
          tile.scores.stride);
    }
  }
}

// out += weights * values. kRows = 1 reads exactly the values that a row sees, so that an inf or
// NaN among the others does not meet its zero weight.
template <class C, int kRows>
void accumulate_values(const ForwardTile<C>& tile, const C* values, int64_t queries,
                       const Visible& visible) {
  for (int64_t d = 0; d < tile.out.stride; d += kPanel<C>) {
    for (int64_t r = 0; r < queries; r += kRows) {
      const int64_t depth = visible.end(r + kRows - 1);
      if (depth == 0) continue;
      multiply_tile<C, kRows, Left::kRowMajor, true>(tile.scores.row(r), tile.scores.stride,
                                                     values + d * visible.keys, depth,
                                                     tile.out.row(r) + d, tile.out.stride);
    }
  }
}

// One block of keys for one block of queries.
template <class T>
void attend_block(const ForwardTile<Compute<T>>& tile, const Compute<T>* keys,
                  const Compute<T>* values, bool finite, int64_t dim, int64_t queries,
                  const Visible& visible) {
  using C = Compute<T>;
  multiply_scores(tile, keys, dim, queries, visible);
  for (int64_t r = 0; r < queries; ++r) {
    const int64_t group_end = visible.end(round_down(r, kTileRows) + kTileRows - 1);
    if (group_end == 0) continue;
    const C factor =
        weigh_row<C, kExp2Degree<T>>(tile.scores.row(r), visible.end(r), group_end, tile.state[r]);
    if (factor != 1) scale_row(tile.out.row(r), tile.out.stride, factor);
  }
  if (finite || visible.all()) {
    accumulate_values<C, kTileRows>(tile, values, queries, visible);
  } else {
    accumulate_values<C, 1>(tile, values, queries, visible);
  }
}

template <class T>
class Forward {
 public:
  using C = Compute<T>;

  Forward(const ForwardParams& params, const Extent& extent, int threads)
      : params_(params), problem_(params.problem), extent_(extent), threads_(threads) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t tiles = static_cast<size_t>(threads) * tile_bytes(problem);
    const size_t head = head_bytes(problem, extent);
    const size_t heads = static_cast<size_t>(problem.batch * problem.num_heads_kv);
    size_t wave = head == 0 ? heads : kWaveBytes / head;
    if (wave < static_cast<size_t>(threads)) wave = static_cast<size_t>(threads);
    if (wave > heads) wave = heads;
    if (wave < 1) wave = 1;
    return {tiles + head, tiles + wave * head};
  }

  void run() {
    const int64_t heads = problem_.batch * problem_.num_heads_kv;
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    const size_t fit = (params_.workspace_bytes - tiles) / head_bytes(problem_, extent_);
    const int64_t wave = fit < static_cast<size_t>(heads) ? static_cast<int64_t>(fit) : heads;
    const int64_t key_blocks = (extent_.max_k + kBlockK - 1) / kBlockK;
    const int64_t query_blocks = (extent_.max_q + kBlockQ - 1) / kBlockQ;
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    const bool flush = sizeof(C) == sizeof(float);
    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = smaller_of(wave, heads - first);
      parallel_for(threads_, count * key_blocks, flush, [&](int64_t task, int) {
        pack(first + task / key_blocks, task / key_blocks, task % key_blocks);
      });
      parallel_for(threads_, count * group * query_blocks, flush, [&](int64_t task, int thread) {
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
    ForwardTile<C>::take(arena, problem.head_dim);
    return arena.used();
  }
  static size_t head_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    PackedHead<C>::take(arena, extent.max_k, problem.head_dim);
    return arena.used();
  }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  ForwardTile<C> tile(int thread) const {
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes(problem_));
    return ForwardTile<C>::take(arena, problem_.head_dim);
  }
  PackedHead<C> packed(int64_t slot) const {
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    Arena arena(workspace() + tiles + static_cast<size_t>(slot) * head_bytes(problem_, extent_));
    return PackedHead<C>::take(arena, extent_.max_k, problem_.head_dim);
  }

  void pack(int64_t pair, int64_t slot, int64_t block) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head = pair % problem_.num_heads_kv;
    const int64_t k0 = block * kBlockK;
    const int64_t keys = smaller_of(kBlockK, seq.k_len - k0);
    if (keys <= 0) return;
    const PackedHead<C> to = packed(slot);
    const int64_t dim = problem_.head_dim;
    pack_transposed(key_rows<const T>(params_.k, seq, head).from(k0), keys, dim, C{1},
                    to.keys + k0 * dim);
    to.finite[block] = pack_rows(key_rows<const T>(params_.v, seq, head).from(k0), keys, dim,
                                 to.values + k0 * round_up(dim, kPanel<C>));
  }

  void attend(int64_t pair, int64_t slot, int64_t in_group, int64_t block, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    const int64_t head = pair % problem_.num_heads_kv * group + in_group;
    const int64_t q0 = block * kBlockQ;
    const int64_t queries = smaller_of(kBlockQ, seq.q_len - q0);
    if (queries <= 0) return;
    const int64_t dim = problem_.head_dim;
    const ForwardTile<C> tile = this->tile(thread);
    const PackedHead<C> from = packed(slot);
    const C scale = static_cast<C>(problem_.softmax_scale) * kLog2E<C>;
    copy_rows(query_rows<const T>(params_.q, seq, head).from(q0), queries, dim, scale, tile.q);
    for (int64_t r = 0; r < round_up(queries, kTileRows); ++r) {
      tile.state[r] = RowState<C>{};
      for (int64_t d = 0; d < tile.out.stride; ++d) tile.out.row(r)[d] = 0;
    }
    const int64_t end = visible_keys(problem_, seq, q0, 0, seq.k_len).end(queries - 1);
    for (int64_t k0 = 0; k0 < end; k0 += kBlockK) {
      const int64_t keys = smaller_of(kBlockK, seq.k_len - k0);
      attend_block<T>(tile, from.keys + k0 * dim, from.values + k0 * tile.out.stride,
                      from.finite[k0 / kBlockK], dim, queries,
                      visible_keys(problem_, seq, q0, k0, keys));
    }
    const Rows<T> out = query_rows<T>(params_.out, seq, head).from(q0);
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
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
