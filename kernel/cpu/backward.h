// Backward: dq, dk, dv of out = softmax(scale q k^T) v, given dout and the gradient of the
// log-sum-exp (FlashAttention-2, Algorithm 2).
//
//   S^T = K Q^T              P^T  = exp(scale S^T - lse)     dV += P^T dO
//   dP^T = V dO^T            dS^T = P^T (dP^T - delta)       dK += dS^T Q      dQ += dS K
//
// Where there are enough heads to go round, a task is a (sequence, key/value head): it goes through
// the query heads of the group one by one and adds up all of dk, dv and of a head's dq.
//
// Where there are not, the keys of a sequence are cut into parts, its queries into as many chunks,
// and the work into turns: in turn t, part p meets chunk (p + t) modulo their number. No two tasks
// of a turn add to the same rows of dq, dk or dv, so one array of each is enough for all threads,
// and the order of the additions depends on the problem alone: bitwise the same for any number of
// threads, without atomics. The memory grows with the lengths, not with the threads.
//
// How operands are packed and multiplied is the matter of `Products`: VectorBackward
// (backward_vector.h) or TileBackward (backward_tiles.h).
#pragma once

#include "arena.h"
#include "backward_statistics.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"
#include "score_gradients.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// How the keys of a sequence are divided: enough tasks for a large machine, even where a mask
// leaves some turns few of them, but parts long enough that packing keys once per turn does not
// show.
struct KeySplit {
  int64_t keys;  // per part; the last of a sequence may be shorter

  static KeySplit of(const Problem& problem, int64_t block) {
    constexpr int64_t kTasks = 64, kManyHeads = 16;
    constexpr int64_t kMinKeys = 1024;
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    const int64_t wanted = heads > kManyHeads ? 1 : kTasks / heads;
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

  Backward(const BackwardParams& params, const Scores& scores, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        scores_(scores),
        extent_(extent),
        threads_(useful_threads(params.problem, extent, threads)),
        split_(KeySplit::of(params.problem, kBlockK)),
        parts_(split_.count(extent.max_k)),
        group_(problem_.group()) {}

  static Scratch scratch(const Problem& problem, const Scores& scores, const Extent& extent,
                         int threads) {
    const auto useful = static_cast<size_t>(useful_threads(problem, extent, threads));
    const size_t bytes =
        shared_bytes(problem, scores, extent) + useful * thread_bytes(problem, scores, extent);
    const size_t of_scores = ScoreGradients<Products>::scratch(problem, scores, threads);
    const size_t wanted = bytes > of_scores ? bytes : of_scores;
    return {wanted, wanted};
  }

  void run() {
    const ScoreGradients<Products> gradients(params_, scores_, extent_, threads_);
    gradients.clear();
    differentiate_all();
    if (!scores_.wants_gradients()) return;
    gradients.store_slopes(slope_parts(), parts_);
    gradients.run();  // over the same memory
  }

 private:
  void differentiate_all() {
    const int64_t pairs = problem_.batch * problem_.num_heads_kv;
    const int64_t slopes = slope_part_count(problem_, scores_, extent_);
    double* const of_slopes = slope_parts();
    for (int64_t i = 0; i < slopes; ++i) of_slopes[i] = 0;
    if (parts_ == 1) {
      parallel_for(threads_, pairs, kFlush,
                   [&](int64_t pair, int thread) { differentiate(pair, thread); });
      return;
    }
    for_each_block([&](const Place& at, int64_t q0, int thread) { pack_block(at, q0, thread); });
    for (int64_t turn = 0; turn < parts_; ++turn) {
      parallel_for(threads_, pairs * parts_, kFlush, [&](int64_t task, int thread) {
        take_turn(turn, task / parts_, task % parts_, thread);
      });
    }
    for_each_block([&](const Place& at, int64_t q0, int) { store_dq(packed_of(at), at, q0); });
  }

  static constexpr int64_t kBlockQ = Products::kBlockQ;
  static constexpr int64_t kBlockK = Products::kBlockK;
  static constexpr bool kFlush = sizeof(C) == sizeof(float);

  // A query head of a sequence.
  struct Place {
    Sequence seq;
    int64_t head;
  };

  // Queries, block behind block, and what is known of them.
  struct Packed {
    typename Products::Queries queries;
    Statistics<C> statistics;
    uint8_t* finite;  // per block: no inf or NaN in q and dout
    C* dq;            // per block dq_size numbers

    static Packed take(Arena& arena, const Problem& problem, int64_t blocks) {
      Packed packed;
      packed.queries = Products::Queries::take(arena, problem, blocks * kBlockQ);
      packed.statistics = Statistics<C>::take(arena, blocks * kBlockQ, problem.lse_is_double);
      packed.finite = arena.take<uint8_t>(blocks);
      packed.dq = arena.take<C>(blocks * dq_size(problem));
      return packed;
    }
    Packed from(const Problem& problem, int64_t block) const {
      return {queries.from(problem, block * kBlockQ),
              statistics.block(block * kBlockQ, statistics.queries - block * kBlockQ),
              finite + block, dq + block * dq_size(problem)};
    }
  };

  // dk and dv of some keys: [keys, head_dim or head_dim_v].
  struct Sums {
    Matrix<C> dk, dv;

    static Sums take(Arena& arena, const Problem& problem, int64_t keys) {
      const int64_t wide = Products::padded(problem.head_dim);
      const int64_t wide_v = Products::padded(problem.head_dim_v);
      Sums sums;
      sums.dk = {arena.take<C>(keys * wide), wide};
      sums.dv = {arena.take<C>(keys * wide_v), wide_v};
      return sums;
    }
    Sums from(int64_t key) const { return {{dk.row(key), dk.stride}, {dv.row(key), dv.stride}}; }
    void clear(int64_t keys) const {
      Backward::clear(dk.data, keys * dk.stride);
      Backward::clear(dv.data, keys * dv.stride);
    }
  };

  // What a thread needs: a tile and, unless the keys are split, all else for the longest sequence.
  struct Memory {
    typename Products::Tile tile;
    Packed packed;
    Sums sums;

    static Memory take(Arena& arena, const Problem& problem, const Scores& scores,
                       const Extent& extent) {
      Memory memory = {};
      memory.tile = Products::Tile::take(arena, problem, scores);
      if (is_split(problem, extent)) return memory;
      memory.packed = Packed::take(arena, problem, blocks_of(larger_of(extent.max_q, 1)));
      memory.sums = Sums::take(arena, problem, round_up(extent.max_k, kBlockK));
      return memory;
    }
  };

  // What all threads share: the gradient of alibi_slopes, a number for every query head of a
  // sequence and part of its keys; and, where the keys are split, all query heads and key/value
  // heads.
  struct Shared {
    double* slopes;
    Packed packed;
    Sums sums;

    static Shared take(Arena& arena, const Problem& problem, const Scores& scores,
                       const Extent& extent) {
      Shared shared = {};
      shared.slopes = arena.take<double>(slope_part_count(problem, scores, extent));
      if (!is_split(problem, extent)) return shared;
      shared.packed = Packed::take(arena, problem, problem.num_heads * all_blocks(problem));
      shared.sums =
          Sums::take(arena, problem, problem.num_heads_kv * all_key_blocks(problem) * kBlockK);
      return shared;
    }
  };

  static int64_t parts_of(const Problem& problem, const Extent& extent) {
    return KeySplit::of(problem, kBlockK).count(extent.max_k);
  }
  static bool is_split(const Problem& problem, const Extent& extent) {
    return parts_of(problem, extent) > 1;
  }
  static int useful_threads(const Problem& problem, const Extent& extent, int threads) {
    const int64_t tasks = problem.batch * problem.num_heads_kv * parts_of(problem, extent);
    return static_cast<int>(larger_of(smaller_of(threads, tasks), 1));
  }
  static int64_t blocks_of(int64_t queries) { return (queries + kBlockQ - 1) / kBlockQ; }
  static int64_t dq_size(const Problem& problem) {
    return kBlockQ * Products::padded(problem.head_dim);
  }
  // Blocks of all sequences: each begins a block of its own.
  static int64_t all_blocks(const Problem& problem) {
    return problem.is_varlen() ? problem.total_q / kBlockQ + problem.batch
                               : problem.batch * blocks_of(problem.seqlen_q);
  }
  static int64_t key_blocks_of(int64_t keys) { return (keys + kBlockK - 1) / kBlockK; }
  static int64_t all_key_blocks(const Problem& problem) {
    return problem.is_varlen() ? problem.total_k / kBlockK + problem.batch
                               : problem.batch * key_blocks_of(problem.seqlen_k);
  }

  static int64_t slope_part_count(const Problem& problem, const Scores& scores,
                                  const Extent& extent) {
    if (!scores.dalibi_slopes.exists()) return 0;
    return problem.batch * problem.num_heads * parts_of(problem, extent);
  }
  static size_t thread_bytes(const Problem& problem, const Scores& scores, const Extent& extent) {
    Arena arena(nullptr);
    Memory::take(arena, problem, scores, extent);
    return arena.used();
  }
  static size_t shared_bytes(const Problem& problem, const Scores& scores, const Extent& extent) {
    Arena arena(nullptr);
    Shared::take(arena, problem, scores, extent);
    return arena.used();
  }
  Shared shared() const {
    Arena arena(params_.workspace);
    return Shared::take(arena, problem_, scores_, extent_);
  }
  double* slope_parts() const { return shared().slopes; }
  Memory memory_of(int thread) const {
    Arena arena(static_cast<char*>(params_.workspace) + shared_bytes(problem_, scores_, extent_) +
                static_cast<size_t>(thread) * thread_bytes(problem_, scores_, extent_));
    return Memory::take(arena, problem_, scores_, extent_);
  }
  Packed packed_of(const Place& at) const {
    const int64_t first = problem_.is_varlen() ? at.seq.q_begin / kBlockQ + at.seq.index
                                               : at.seq.index * blocks_of(problem_.seqlen_q);
    return shared().packed.from(problem_, at.head * all_blocks(problem_) + first);
  }
  Sums sums_of(const Sequence& seq, int64_t head_kv) const {
    const int64_t first = problem_.is_varlen() ? seq.k_begin / kBlockK + seq.index
                                               : seq.index * key_blocks_of(problem_.seqlen_k);
    return shared().sums.from((head_kv * all_key_blocks(problem_) + first) * kBlockK);
  }

  // A whole sequence and key/value head.
  void differentiate(int64_t pair, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head_kv = pair % problem_.num_heads_kv;
    const Range keys = {0, seq.k_len}, queries = {0, seq.q_len};
    const Memory memory = memory_of(thread);
    memory.sums.clear(round_up(seq.k_len, kBlockK));
    for (int64_t head = head_kv * group_; head < (head_kv + 1) * group_; ++head) {
      const Place at = {seq, head};
      const HeadScores<C> scores(problem_, scores_, seq, head);
      Products products(problem_, scores, memory.packed.queries, memory.tile);
      for (int64_t q0 = 0; q0 < seq.q_len; q0 += kBlockQ) pack(products, memory.packed, at, q0);
      add(products, memory.packed, memory.sums, at, {keys, queries});
      add_slope_gradient(products, at, 0);
      for (int64_t q0 = 0; q0 < seq.q_len; q0 += kBlockQ) store_dq(memory.packed, at, q0);
    }
    store_keys(memory.sums, seq, head_kv, keys);
  }

  // Calls visit(place, q0, thread) for every block of queries of every head.
  template <class Visit>
  void for_each_block(const Visit& visit) const {
    const int64_t blocks = blocks_of(extent_.max_q);
    const int64_t tasks = problem_.batch * problem_.num_heads * blocks;
    parallel_for(threads_, tasks, kFlush, [&](int64_t task, int thread) {
      const int64_t row = task / blocks, q0 = task % blocks * kBlockQ;
      const Place at = {sequence_of(problem_, row / problem_.num_heads), row % problem_.num_heads};
      if (q0 < at.seq.q_len) visit(at, q0, thread);
    });
  }

  void pack_block(const Place& at, int64_t q0, int thread) const {
    const Packed packed = packed_of(at);
    const HeadScores<C> scores(problem_, scores_, at.seq, at.head);
    Products products(problem_, scores, packed.queries, memory_of(thread).tile);
    pack(products, packed, at, q0);
  }

  void take_turn(int64_t turn, int64_t pair, int64_t part, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head_kv = pair % problem_.num_heads_kv, parts = split_.count(seq.k_len);
    if (part >= parts || turn >= parts) return;
    const Range keys = {part * split_.keys, smaller_of((part + 1) * split_.keys, seq.k_len)};
    const int64_t chunk = round_up((seq.q_len + parts - 1) / parts, kBlockQ);
    const int64_t first = (part + turn) % parts * chunk;
    const Range queries = {smaller_of(first, seq.q_len), smaller_of(first + chunk, seq.q_len)};
    const Sums sums = sums_of(seq, head_kv).from(keys.begin);
    if (turn == 0) sums.clear(round_up(keys.end - keys.begin, kBlockK));
    for (int64_t head = head_kv * group_; head < (head_kv + 1) * group_; ++head) {
      const Place at = {seq, head};
      const Packed packed = packed_of(at);
      const HeadScores<C> scores(problem_, scores_, seq, head);
      Products products(problem_, scores, packed.queries, memory_of(thread).tile);
      add(products, packed, sums, at, {keys, queries});
      add_slope_gradient(products, at, part);
    }
    if (turn == parts - 1) store_keys(sums, seq, head_kv, keys);
  }

  // A part of the keys is one task's, turn after turn: the sum has one order.
  void add_slope_gradient(const Products& products, const Place& at, int64_t part) const {
    if (!scores_.dalibi_slopes.exists()) return;
    const int64_t head = at.seq.index * problem_.num_heads + at.head;
    slope_parts()[head * parts_ + part] += products.slope_gradient();
  }

  KeyRows<T> rows_of_keys(const Place& at) const {
    return {key_rows<const T>(params_.k, at.seq, at.head / group_),
            key_rows<const T>(params_.v, at.seq, at.head / group_)};
  }

  struct Area {
    Range keys, queries;
  };

  // Adds what an area of the scores of a head gives to dq, dk and dv. `sums` begins with its keys.
  void add(Products& products, const Packed& packed, const Sums& sums, const Place& at,
           const Area& area) const {
    const KeyRows<T> rows = rows_of_keys(at);
    const Visible& visible = at.seq.visible;
    for (int64_t k0 = area.keys.begin; k0 < area.keys.end; k0 += kBlockK) {
      const int64_t count = smaller_of(kBlockK, area.keys.end - k0);
      const Range seen = visible.queries_of_group(k0, count);
      const Range range = {larger_of(seen.begin, area.queries.begin),
                           smaller_of(seen.end, area.queries.end)};
      if (range.empty()) continue;
      const bool keys_finite = products.pack_keys(rows.k.from(k0), rows.v.from(k0), count);
      const Sums to = sums.from(k0 - area.keys.begin);
      for (int64_t q0 = round_down(range.begin, kBlockQ); q0 < range.end; q0 += kBlockQ) {
        const int64_t queries = smaller_of(kBlockQ, at.seq.q_len - q0), block = q0 / kBlockQ;
        products.differentiate(q0, {q0, k0}, visible.block(q0, queries, k0, count),
                               packed.statistics.block(q0, queries),
                               keys_finite && packed.finite[block] != 0,
                               {packed.dq + block * dq_size(problem_), to.dk, to.dv});
      }
    }
  }

  // A block of queries and its place in dq. Queries that see no key are not read.
  void pack(Products& products, const Packed& packed, const Place& at, int64_t q0) const {
    const int64_t queries = smaller_of(kBlockQ, at.seq.q_len - q0);
    clear(packed.dq + q0 / kBlockQ * dq_size(problem_), dq_size(problem_));
    if (at.seq.visible.keys_of_group(q0, queries).empty()) return;
    pack_queries(products, packed, at, q0);
    refine_statistics(products, rows_of_keys(at), at.seq.visible, q0, q0,
                      packed.statistics.block(q0, queries));
  }

  void pack_queries(Products& products, const Packed& to, const Place& at, int64_t q0) const {
    const auto& [seq, head] = at;
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

  void store_dq(const Packed& packed, const Place& at, int64_t q0) const {
    Products::store_dq(problem_, packed.dq + q0 / kBlockQ * dq_size(problem_), scale(),
                       smaller_of(kBlockQ, at.seq.q_len - q0),
                       query_rows<T>(params_.dq, at.seq, at.head).from(q0));
  }

  void store_keys(const Sums& sums, const Sequence& seq, int64_t head_kv, const Range& keys) const {
    const Rows<T> dk = key_rows<T>(params_.dk, seq, head_kv).from(keys.begin);
    const Rows<T> dv = key_rows<T>(params_.dv, seq, head_kv).from(keys.begin);
    for (int64_t j = 0; j < keys.end - keys.begin; ++j) {
      narrow(sums.dk.row(j), problem_.head_dim, scale(), dk.row(j));
      narrow(sums.dv.row(j), problem_.head_dim_v, C{1}, dv.row(j));
    }
  }
  static void clear(C* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) numbers[i] = 0;
  }
  C scale() const { return static_cast<C>(problem_.exact_scale); }

  const BackwardParams& params_;
  const Problem& problem_;
  const Scores& scores_;
  const Extent extent_;
  const int threads_;
  const KeySplit split_;
  const int64_t parts_;  // of the longest sequence
  const int64_t group_;  // query heads of a key/value head
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
