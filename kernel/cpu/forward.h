// Forward: out = softmax(scale q k^T) v and its log-sum-exp (FlashAttention-2, Algorithm 1).
//
// Heads are taken in waves that fit the workspace. Phase 1 packs the keys and values of the wave's
// key/value heads once; phase 2 runs one task per (key/value head, query head of its group, block
// of queries) over the key blocks that it sees, so packing hides every layout and storage format,
// and the heads of a group share it. Keys that no query sees are not read. Blocks are counted from
// a sequence's own first row, so its results do not depend on its neighbours or on pages.
//
// Where the workspace has no room for a head, as it may be with a long sequence in a cache, every
// task packs the blocks for itself, one after the other: the same bits, in room for a block.
//
// What is packed and how a block of keys meets a block of queries is the matter of `Products`:
// VectorForward (forward_vector.h) or TileForward (forward_tiles.h).
#pragma once

#include "arena.h"
#include "engine.h"
#include "parallel.h"
#include "scores.h"
#include "sequence.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class Products>
class Forward {
 public:
  using T = typename Products::Storage;     // of q and out
  using K = typename Products::KeyStorage;  // of k and v
  using Head = typename Products::Head;

  Forward(const ForwardParams& params, const Scores& scores, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        scores_(scores),
        extent_(extent),
        threads_(threads) {}

  static Scratch scratch(const Problem& problem, const Scores& scores, const Extent& extent,
                         int threads) {
    const size_t tiles = static_cast<size_t>(threads) * tile_bytes(problem, scores);
    const size_t head = head_bytes(problem, extent.max_k);
    const size_t blocks = static_cast<size_t>(threads) * head_bytes(problem, Products::kBlockK);
    const size_t least = head < blocks ? head : blocks;
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    size_t wanted = static_cast<size_t>(heads) * head;
    if (problem.cache.exists()) {  // no multiple of a capacity far beyond any sequence
      wanted = wanted < kWaveBytes ? wanted : kWaveBytes;
    } else {
      const int64_t wave = larger_of(static_cast<int64_t>(kWaveBytes / head), threads);
      wanted = static_cast<size_t>(smaller_of(wave, heads)) * head;
    }
    return {tiles + least, tiles + (wanted > least ? wanted : least)};
  }

  void run() {
    const size_t fit = (params_.workspace_bytes - tiles()) / head_bytes(problem_, extent_.max_k);
    const int64_t heads = problem_.batch * problem_.num_heads_kv;
    const int64_t wave = fit < static_cast<size_t>(heads) ? static_cast<int64_t>(fit) : heads;
    if (wave == 0) {
      attend_all({0, heads}, [&](int64_t pair, int64_t k0, int thread) {
        const Head block = head_at(thread, Products::kBlockK);
        pack(pair, k0, block, 0);
        return PackedBlock{block, 0};
      });
    }
    const int64_t key_blocks = (extent_.max_k + Products::kBlockK - 1) / Products::kBlockK;
    for (int64_t first = 0; wave > 0 && first < heads; first += wave) {
      const int64_t count = smaller_of(wave, heads - first);
      parallel_for(threads_, count * key_blocks, kFlush, [&](int64_t task, int) {
        const int64_t slot = task / key_blocks, k0 = task % key_blocks * Products::kBlockK;
        pack(first + slot, k0, head_at(slot, extent_.max_k), k0);
      });
      attend_all({first, first + count}, [&](int64_t pair, int64_t k0, int) {
        return PackedBlock{head_at(pair - first, extent_.max_k), k0};
      });
    }
  }

 private:
  static constexpr size_t kWaveBytes = size_t{64} << 20;
  static constexpr bool kFlush = sizeof(Compute<T>) == sizeof(float);

  // A block of keys and values: from key `at` of what is packed on.
  struct PackedBlock {
    Head head;
    int64_t at;
  };

  static size_t tile_bytes(const Problem& problem, const Scores& scores) {
    Arena arena(nullptr);
    Products::Tile::take(arena, problem, scores);
    return arena.used();
  }
  size_t tile_bytes() const { return tile_bytes(problem_, scores_); }
  static size_t head_bytes(const Problem& problem, int64_t keys) {
    Arena arena(nullptr);
    Head::take(arena, larger_of(keys, 1), problem);
    return arena.used();
  }
  size_t tiles() const { return static_cast<size_t>(threads_) * tile_bytes(); }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  // Behind the tiles: one place after the other for `keys` packed keys.
  Head head_at(int64_t place, int64_t keys) const {
    Arena arena(workspace() + tiles() + static_cast<size_t>(place) * head_bytes(problem_, keys));
    return Head::take(arena, larger_of(keys, 1), problem_);
  }

  // The block of keys that starts at k0, if some query sees it, as keys `at` and up of `to`.
  void pack(int64_t pair, int64_t k0, const Head& to, int64_t at) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head = pair % problem_.num_heads_kv;
    const int64_t keys = smaller_of(Products::kBlockK, seq.k_len - k0);
    if (extent_.leaves_out(seq.q_len)) return;
    if (keys <= 0 || seq.visible.queries_of_group(k0, keys).empty()) return;
    if (problem_.cache.exists()) {
      const K *k[Products::kBlockK], *v[Products::kBlockK];
      list_keys(problem_, params_.k, seq, head, {k0, k0 + keys}, k);
      list_keys(problem_, params_.v, seq, head, {k0, k0 + keys}, v);
      to.pack(problem_, at, keys, RowList<const K>{k}, RowList<const K>{v});
      return;
    }
    to.pack(problem_, at, keys, key_rows<const K>(params_.k, seq, head).from(k0),
            key_rows<const K>(params_.v, seq, head).from(k0));
  }

  // All queries of the key/value heads `pairs`, counted over all sequences. packed_block(pair, k0,
  // thread): where the block that starts at k0 is packed.
  template <class PackedBlocks>
  void attend_all(const Range& pairs, const PackedBlocks& packed_block) const {
    const int64_t query_blocks = (extent_.max_q + Products::kBlockQ - 1) / Products::kBlockQ;
    const int64_t tasks = problem_.group() * query_blocks;
    parallel_for(threads_, (pairs.end - pairs.begin) * tasks, kFlush,
                 [&](int64_t task, int thread) {
                   const int64_t pair = pairs.begin + task / tasks;
                   const int64_t block = query_blocks - 1 - task % query_blocks;  // longest first
                   attend(pair, task % tasks / query_blocks, block * Products::kBlockQ, thread,
                          [&](int64_t k0) { return packed_block(pair, k0, thread); });
                 });
  }

  template <class PackedBlocks>
  void attend(int64_t pair, int64_t in_group, int64_t q0, int thread,
              const PackedBlocks& packed_block) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t group = problem_.group();
    const int64_t head = pair % problem_.num_heads_kv * group + in_group;
    const int64_t queries = smaller_of(Products::kBlockQ, seq.q_len - q0);
    if (queries <= 0 || extent_.leaves_out(seq.q_len)) return;
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes());
    const HeadScores<Compute<T>> scores(problem_, scores_, seq, head);
    Products products(problem_, scores, Products::Tile::take(arena, problem_, scores_));
    products.begin(query_rows<const T>(params_.q, seq, head).from(q0), queries);
    const Range seen = seq.visible.keys_of_group(q0, queries);
    for (int64_t k0 = round_down(seen.begin, Products::kBlockK); k0 < seen.end;
         k0 += Products::kBlockK) {
      const int64_t keys = smaller_of(Products::kBlockK, seq.k_len - k0);
      const PackedBlock block = packed_block(k0);
      products.attend(block.head, block.at, {q0, k0}, seq.visible.block(q0, queries, k0, keys));
    }
    const Rows<T> out = query_rows<T>(params_.out, seq, head).from(q0);
    const RowValues lse = row_values(problem_, params_.lse, seq, head);
    Compute<T> most = -kInfinity<Compute<T>>;
    for (int64_t r = 0; r < queries; ++r) {
      const bool sees_keys = !seq.visible.keys_of(q0 + r).empty();
      finish_row<T>(
          {products.out(r), products.state(r), sees_keys, scores.scale(), scores.row_end(q0 + r)},
          problem_.head_dim_v, out.row(r), lse.from(q0 + r));
      if (products.state(r).largest > most) most = products.state(r).largest;
    }
    scores.raise_max_logit(static_cast<double>(most) * scores.scale());
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Scores& scores_;
  const Extent extent_;
  const int threads_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
