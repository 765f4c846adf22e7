// Forward: out = softmax(scale q k^T) v and its log-sum-exp (FlashAttention-2, Algorithm 1).
//
// Heads are taken in waves that fit the workspace. Phase 1 packs the keys and values of the wave's
// key/value heads once; phase 2 runs one task per (key/value head, query head of its group, block
// of queries) over the key blocks that it sees, so packing hides every layout and storage format,
// and the heads of a group share it. Keys that no query sees are not read. Blocks are counted from
// a sequence's own first row, so its results do not depend on its neighbours or on pages.
//
// What is packed and how a block of keys meets a block of queries is the matter of `Products`:
// VectorForward (forward_vector.h) or TileForward (forward_tiles.h).
#pragma once

#include "arena.h"
#include "engine.h"
#include "parallel.h"
#include "sequence.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class Products>
class Forward {
 public:
  using T = typename Products::Storage;
  using Head = typename Products::Head;

  Forward(const ForwardParams& params, const Extent& extent, int threads)
      : params_(params), problem_(params.problem), extent_(extent), threads_(threads) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t tiles = static_cast<size_t>(threads) * tile_bytes(problem);
    const size_t head = head_bytes(problem, extent);
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    const int64_t wave = larger_of(static_cast<int64_t>(kWaveBytes / head), threads);
    return {tiles + head, tiles + static_cast<size_t>(smaller_of(wave, heads)) * head};
  }

  void run() {
    const int64_t heads = problem_.batch * problem_.num_heads_kv;
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    const size_t fit = (params_.workspace_bytes - tiles) / head_bytes(problem_, extent_);
    const int64_t wave = fit < static_cast<size_t>(heads) ? static_cast<int64_t>(fit) : heads;
    const int64_t key_blocks = (extent_.max_k + Products::kBlockK - 1) / Products::kBlockK;
    const int64_t query_blocks = (extent_.max_q + Products::kBlockQ - 1) / Products::kBlockQ;
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    const bool flush = sizeof(Compute<T>) == sizeof(float);
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
    Products::Tile::take(arena, problem);
    return arena.used();
  }
  static size_t head_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    Head::take(arena, larger_of(extent.max_k, 1), problem);
    return arena.used();
  }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  Head packed(int64_t slot) const {
    const size_t tiles = static_cast<size_t>(threads_) * tile_bytes(problem_);
    Arena arena(workspace() + tiles + static_cast<size_t>(slot) * head_bytes(problem_, extent_));
    return Head::take(arena, larger_of(extent_.max_k, 1), problem_);
  }

  void pack(int64_t pair, int64_t slot, int64_t block) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head = pair % problem_.num_heads_kv;
    const int64_t k0 = block * Products::kBlockK;
    const int64_t keys = smaller_of(Products::kBlockK, seq.k_len - k0);
    if (extent_.leaves_out(seq.q_len)) return;
    if (keys <= 0 || seq.visible.queries_of_group(k0, keys).empty()) return;
    if (problem_.cache.exists()) {
      const T *k[Products::kBlockK], *v[Products::kBlockK];
      list_keys(problem_, params_.k, seq, head, {k0, k0 + keys}, k);
      list_keys(problem_, params_.v, seq, head, {k0, k0 + keys}, v);
      packed(slot).pack(problem_, k0, keys, RowList<const T>{k}, RowList<const T>{v});
      return;
    }
    packed(slot).pack(problem_, k0, keys, key_rows<const T>(params_.k, seq, head).from(k0),
                      key_rows<const T>(params_.v, seq, head).from(k0));
  }

  void attend(int64_t pair, int64_t slot, int64_t in_group, int64_t block, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    const int64_t head = pair % problem_.num_heads_kv * group + in_group;
    const int64_t q0 = block * Products::kBlockQ;
    const int64_t queries = smaller_of(Products::kBlockQ, seq.q_len - q0);
    if (queries <= 0 || extent_.leaves_out(seq.q_len)) return;
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes(problem_));
    Products products(problem_, Products::Tile::take(arena, problem_));
    products.begin(query_rows<const T>(params_.q, seq, head).from(q0), queries);
    const Head from = packed(slot);
    const Range seen = seq.visible.keys_of_group(q0, queries);
    for (int64_t k0 = round_down(seen.begin, Products::kBlockK); k0 < seen.end;
         k0 += Products::kBlockK) {
      const int64_t keys = smaller_of(Products::kBlockK, seq.k_len - k0);
      products.attend(from, k0, seq.visible.block(q0, queries, k0, keys));
    }
    const Rows<T> out = query_rows<T>(params_.out, seq, head).from(q0);
    float* lse = row_values(params_.lse, seq, head);
    for (int64_t r = 0; r < queries; ++r) {
      const bool sees_keys = !seq.visible.keys_of(q0 + r).empty();
      finish_row<T>({products.out(r), products.state(r), sees_keys, products.scale()},
                    problem_.head_dim_v, out.row(r), lse == nullptr ? nullptr : lse + q0 + r);
    }
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
