// Backward: dq, dk, dv of out = softmax(scale q k^T) v, given dout and the gradient of the
// log-sum-exp (FlashAttention-2, Algorithm 2).
//
//   S^T = K Q^T              P^T  = exp(scale S^T - lse)     dV += P^T dO
//   dP^T = V dO^T            dS^T = P^T (dP^T - delta)       dK += dS^T Q      dQ += dS K
//
// A task owns a range of keys of one (sequence, key/value head), accumulates their dk and dv over
// the query heads of the group, and all of dq that comes from its keys. Where there are too few
// heads to go round, the keys are split into ranges that depend on the problem alone; their shares
// of dq are added in order afterwards. No atomics: bitwise the same for any number of threads.
//
// How operands are packed and multiplied is the matter of `Products`: VectorBackward
// (backward_vector.h) or TileBackward (backward_tiles.h).
#pragma once

#include "arena.h"
#include "backward_statistics.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// How the keys of a sequence are divided: enough tasks for a large machine, but ranges long enough
// that packing the queries once per range does not show.
struct KeySplit {
  int64_t keys;  // per range; the last of a sequence may be shorter

  static KeySplit of(const Problem& problem, int64_t block) {
    constexpr int64_t kTasks = 32;
    constexpr int64_t kMinKeys = 1024;
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    const int64_t wanted = larger_of(kTasks / heads, 1);
    const int64_t even = (problem.rows_k() + wanted - 1) / wanted;
    return {round_up(larger_of(kMinKeys, even), block)};
  }
  int64_t count(int64_t seqlen_k) const { return larger_of(1, (seqlen_k + keys - 1) / keys); }
};

template <class Products>
class Backward {
 public:
  using T = typename Products::Storage;
  using C = Compute<T>;

  Backward(const BackwardParams& params, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        extent_(extent),
        threads_(threads),
        split_(KeySplit::of(params.problem, kBlockK)),
        parts_(split_.count(extent.max_k)) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t bytes =
        static_cast<size_t>(threads) * thread_bytes(problem, extent) + share_bytes(problem, extent);
    return {bytes, bytes};
  }

  void run() {
    const int64_t pairs = problem_.batch * problem_.num_heads_kv;
    const bool flush = sizeof(C) == sizeof(float);
    parallel_for(threads_, pairs * parts_, flush, [&](int64_t task, int thread) {
      differentiate(task / parts_, task % parts_, thread);
    });
    if (parts_ == 1) return;
    const int64_t blocks = blocks_of(extent_.max_q);
    parallel_for(threads_, problem_.batch * problem_.num_heads * blocks, flush,
                 [&](int64_t task, int) {
                   add_shares(task / blocks / problem_.num_heads,
                              task / blocks % problem_.num_heads, task % blocks);
                 });
  }

 private:
  static constexpr int64_t kBlockQ = Products::kBlockQ;
  static constexpr int64_t kBlockK = Products::kBlockK;

  // What one thread needs for a task. The queries are those of one head, block behind block.
  struct Memory {
    typename Products::Queries queries;
    typename Products::Tile tile;
    Statistics<C> statistics;
    uint8_t* finite;   // per query block: no inf or NaN in q and dout
    C* dq;             // per query block dq_size numbers; unused when the keys are split
    Matrix<C> dk, dv;  // [keys of the range, head_dim or head_dim_v]

    static Memory take(Arena& arena, const Problem& problem, const Extent& extent) {
      const int64_t blocks = blocks_of(larger_of(extent.max_q, 1));
      const int64_t keys =
          smaller_of(KeySplit::of(problem, kBlockK).keys, round_up(extent.max_k, kBlockK));
      const int64_t wide = Products::padded(problem.head_dim);
      const int64_t wide_v = Products::padded(problem.head_dim_v);
      Memory m;
      m.queries = Products::Queries::take(arena, problem, blocks * kBlockQ);
      m.tile = Products::Tile::take(arena, problem);
      m.statistics = Statistics<C>::take(arena, blocks * kBlockQ, problem.lse_is_double);
      m.finite = arena.take<uint8_t>(blocks);
      m.dq = arena.take<C>(blocks * dq_size(problem));
      m.dk = {arena.take<C>(keys * wide), wide};
      m.dv = {arena.take<C>(keys * wide_v), wide_v};
      return m;
    }
  };

  static int64_t blocks_of(int64_t queries) { return (queries + kBlockQ - 1) / kBlockQ; }
  static int64_t dq_size(const Problem& problem) {
    return kBlockQ * Products::padded(problem.head_dim);
  }
  static size_t thread_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    Memory::take(arena, problem, extent);
    return arena.used();
  }
  // Query blocks of all sequences: each begins a block of its own.
  static int64_t all_blocks(const Problem& problem) {
    return problem.is_varlen() ? problem.total_q / kBlockQ + problem.batch
                               : problem.batch * blocks_of(problem.seqlen_q);
  }
  static size_t share_bytes(const Problem& problem, const Extent& extent) {
    const int64_t parts = KeySplit::of(problem, kBlockK).count(extent.max_k);
    if (parts == 1) return 0;
    return static_cast<size_t>(parts * problem.num_heads * all_blocks(problem) * dq_size(problem)) *
           sizeof(C);
  }
  // The share of dq that the keys of range `part` give to the queries of one sequence and head.
  C* share(const Sequence& seq, int64_t batch, int64_t head, int64_t part) const {
    char* const start = static_cast<char*>(params_.workspace) +
                        static_cast<size_t>(threads_) * thread_bytes(problem_, extent_);
    const int64_t first =
        problem_.is_varlen() ? seq.q_begin / kBlockQ + batch : batch * blocks_of(problem_.seqlen_q);
    const int64_t block = (part * problem_.num_heads + head) * all_blocks(problem_) + first;
    return reinterpret_cast<C*>(start) + block * dq_size(problem_);
  }

  void differentiate(int64_t pair, int64_t part, int thread) const {
    const int64_t batch = pair / problem_.num_heads_kv;
    const int64_t head_kv = pair % problem_.num_heads_kv;
    const Sequence seq = sequence_of(problem_, batch);
    if (part >= split_.count(seq.k_len)) return;
    Arena arena(static_cast<char*>(params_.workspace) +
                static_cast<size_t>(thread) * thread_bytes(problem_, extent_));
    const Memory memory = Memory::take(arena, problem_, extent_);
    const Range keys = {part * split_.keys, smaller_of((part + 1) * split_.keys, seq.k_len)};
    clear(memory.dk.data, round_up(keys.end - keys.begin, kBlockK) * memory.dk.stride);
    clear(memory.dv.data, round_up(keys.end - keys.begin, kBlockK) * memory.dv.stride);
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      C* const dq = parts_ == 1 ? memory.dq : share(seq, batch, head, part);
      clear(dq, blocks_of(seq.q_len) * dq_size(problem_));
      differentiate_head(memory, dq, seq, head, keys);
      for (int64_t q0 = 0; parts_ == 1 && q0 < seq.q_len; q0 += kBlockQ) {
        store_dq(dq, seq, head, q0);
      }
    }
    const Rows<T> dk = key_rows<T>(params_.dk, seq, head_kv).from(keys.begin);
    const Rows<T> dv = key_rows<T>(params_.dv, seq, head_kv).from(keys.begin);
    for (int64_t j = 0; j < keys.end - keys.begin; ++j) {
      narrow(memory.dk.row(j), problem_.head_dim, scale(), dk.row(j));
      narrow(memory.dv.row(j), problem_.head_dim_v, C{1}, dv.row(j));
    }
  }

  // All queries of one head against some keys.
  void differentiate_head(const Memory& memory, C* dq, const Sequence& seq, int64_t head,
                          const Range& keys) const {
    const int64_t head_kv = head / (problem_.num_heads / problem_.num_heads_kv);
    const KeyRows<T> rows = {key_rows<const T>(params_.k, seq, head_kv),
                             key_rows<const T>(params_.v, seq, head_kv)};
    Products products(problem_, memory.queries, memory.tile);
    const Range seen = seq.visible.queries_of_group(keys.begin, keys.end - keys.begin);
    for (int64_t q0 = round_down(seen.begin, kBlockQ); q0 < seen.end; q0 += kBlockQ) {
      pack_queries(products, memory, seq, head, q0);
      refine_statistics(products, rows, seq.visible, q0,
                        memory.statistics.block(q0, smaller_of(kBlockQ, seq.q_len - q0)));
    }
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kBlockK) {
      const int64_t count = smaller_of(kBlockK, keys.end - k0);
      const Range range = seq.visible.queries_of_group(k0, count);
      if (range.empty()) continue;
      const bool keys_finite = products.pack_keys(rows.k.from(k0), rows.v.from(k0), count);
      for (int64_t q0 = round_down(range.begin, kBlockQ); q0 < range.end; q0 += kBlockQ) {
        const int64_t queries = smaller_of(kBlockQ, seq.q_len - q0), block = q0 / kBlockQ;
        products.differentiate(q0, seq.visible.block(q0, queries, k0, count),
                               memory.statistics.block(q0, queries),
                               keys_finite && memory.finite[block] != 0,
                               {dq + block * dq_size(problem_),
                                {memory.dk.row(k0 - keys.begin), memory.dk.stride},
                                {memory.dv.row(k0 - keys.begin), memory.dv.stride}});
      }
    }
  }

  void pack_queries(Products& products, const Memory& to, const Sequence& seq, int64_t head,
                    int64_t q0) const {
    const int64_t queries = smaller_of(kBlockQ, seq.q_len - q0);
    const Rows<const T> q = query_rows<const T>(params_.q, seq, head).from(q0);
    const Rows<const T> out = query_rows<const T>(params_.out, seq, head).from(q0);
    const Rows<const T> dout = query_rows<const T>(params_.dout, seq, head).from(q0);
    to.finite[q0 / kBlockQ] = products.pack_queries(q0, queries, q, dout);
    const RowValues lse = row_values(problem_, params_.lse, seq, head).from(q0);
    const RowValues dlse = row_values(problem_, params_.dlse, seq, head).from(q0);
    const Statistics<C> statistics = to.statistics.block(q0, queries);
    for (int64_t i = 0; i < queries; ++i) {
      const C slope = dot(out.row(i), dout.row(i), problem_.head_dim_v);
      statistics.set(i, lse.get(i), slope - (dlse.exists() ? static_cast<C>(dlse.get(i)) : C{0}));
    }
  }

  // Adds the shares of dq of one block of queries, in the order of the keys, and writes them.
  void add_shares(int64_t batch, int64_t head, int64_t block) const {
    const Sequence seq = sequence_of(problem_, batch);
    if (block >= blocks_of(seq.q_len)) return;
    const int64_t size = dq_size(problem_);
    C* const sum = share(seq, batch, head, 0);
    for (int64_t part = 1; part < split_.count(seq.k_len); ++part) {
      const C* term = share(seq, batch, head, part) + block * size;
      for (int64_t i = 0; i < size; ++i) sum[block * size + i] += term[i];
    }
    store_dq(sum, seq, head, block * kBlockQ);
  }

  void store_dq(const C* dq, const Sequence& seq, int64_t head, int64_t q0) const {
    Products::store_dq(problem_, dq + q0 / kBlockQ * dq_size(problem_), scale(),
                       smaller_of(kBlockQ, seq.q_len - q0),
                       query_rows<T>(params_.dq, seq, head).from(q0));
  }

  static void clear(C* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) numbers[i] = 0;
  }
  C scale() const { return static_cast<C>(problem_.exact_scale); }

  const BackwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const KeySplit split_;
  const int64_t parts_;  // of the longest sequence
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
