// Backward: dq, dk, dv of out = softmax(scale q k^T) v, given dout and the gradient of the
// log-sum-exp (FlashAttention-2, Algorithm 2).
//
// A task owns a range of keys of one (sequence, key/value head), accumulates their dk and dv in
// fp32 over the query heads of the group, and all of dq that comes from its keys. Where there are
// too few heads to go round, the keys are split into a number of ranges that depends on the problem
// alone; their shares of dq are added in order afterwards. No atomics: bitwise the same for any
// number of threads.
#pragma once

#include "arena.h"
#include "backward_tile.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kBackwardBlockQ = 96;
constexpr int64_t kBackwardBlockK = 96;

// How the keys are divided: enough tasks for a large machine, but ranges long enough that packing
// the queries once per range does not show.
struct KeySplit {
  int64_t count;
  int64_t keys;  // per range; the last may be shorter

  static KeySplit of(const Problem& problem, const Extent& extent) {
    constexpr int64_t kTasks = 32;
    constexpr int64_t kMinKeys = 1024;
    const int64_t heads = larger_of(problem.batch * problem.num_heads_kv, 1);
    const int64_t count = larger_of(1, smaller_of(kTasks / heads, extent.max_k / kMinKeys));
    return {count, round_up((extent.max_k + count - 1) / count, kBackwardBlockK)};
  }
};

// What one thread needs for a task.
template <class C>
struct BackwardScratch {
  C* q_transposed;  // one query head: see QueryBlock, the blocks one behind the other
  C* dout_transposed;
  C* q;
  C* dout;
  C* lse;            // [queries]
  C* delta;          // [queries]
  uint8_t* finite;   // per query block
  Matrix<C> dq;      // [queries, head_dim]; unused when the keys are split
  Matrix<C> dk, dv;  // [keys of the range, head_dim]
  Matrix<C> k, v;    // [kBackwardBlockK, head_dim]
  C* k_packed;
  BackwardTile<C> tile;

  static BackwardScratch take(Arena& arena, int64_t dim, int64_t max_q, const KeySplit& split) {
    const int64_t queries = round_up(max_q, kBackwardBlockQ);
    const int64_t wide = round_up(dim, kPanel<C>);
    const int64_t narrow = round_up(dim, kLanes<C>);
    const int64_t tile_stride = kBackwardBlockQ + 2 * kLanes<C>;
    BackwardScratch s;
    s.q_transposed = arena.take<C>(queries * dim);
    s.dout_transposed = arena.take<C>(queries * dim);
    s.q = arena.take<C>(queries * wide);
    s.dout = arena.take<C>(queries * wide);
    s.lse = arena.take<C>(queries);
    s.delta = arena.take<C>(queries);
    s.finite = arena.take<uint8_t>(queries / kBackwardBlockQ);
    s.dq = {arena.take<C>(split.count > 1 ? 0 : queries * wide), wide};
    s.dk = {arena.take<C>(split.keys * wide), wide};
    s.dv = {arena.take<C>(split.keys * wide), wide};
    s.k = {arena.take<C>(kBackwardBlockK * narrow), narrow};
    s.v = {arena.take<C>(kBackwardBlockK * narrow), narrow};
    s.k_packed = arena.take<C>(kBackwardBlockK * wide);
    s.tile.p = {arena.take<C>(kBackwardBlockK * tile_stride), tile_stride};
    s.tile.ds = {arena.take<C>(kBackwardBlockK * tile_stride), tile_stride};
    return s;
  }
};

template <class C>
FLASHTILE_INLINE void clear_rows(const Matrix<C>& m, int64_t rows) {
  // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): not null, see Matrix
  for (int64_t i = 0; i < rows * m.stride; ++i) m.data[i] = 0;
}

template <class T>
class Backward {
 public:
  using C = Compute<T>;

  Backward(const BackwardParams& params, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        extent_(extent),
        threads_(threads),
        split_(KeySplit::of(params.problem, extent)) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const KeySplit split = KeySplit::of(problem, extent);
    const size_t bytes = static_cast<size_t>(threads) * thread_bytes(problem, extent, split) +
                         shared_bytes(problem, split);
    return {bytes, bytes};
  }

  void run() {
    const int64_t pairs = problem_.batch * problem_.num_heads_kv;
    const bool flush = sizeof(C) == sizeof(float);
    parallel_for(threads_, pairs * split_.count, flush, [&](int64_t task, int thread) {
      differentiate(task / split_.count, task % split_.count, thread);
    });
    if (split_.count == 1) return;
    const int64_t blocks = (extent_.max_q + kBackwardBlockQ - 1) / kBackwardBlockQ;
    parallel_for(threads_, problem_.batch * problem_.num_heads * blocks, flush,
                 [&](int64_t task, int) {
                   add_shares(task / blocks / problem_.num_heads,
                              task / blocks % problem_.num_heads, task % blocks);
                 });
  }

 private:
  static size_t thread_bytes(const Problem& problem, const Extent& extent, const KeySplit& split) {
    Arena arena(nullptr);
    BackwardScratch<C>::take(arena, problem.head_dim, extent.max_q, split);
    return arena.used();
  }
  // Rows of a share of dq: those of all sequences, each followed by room for a whole row group.
  static int64_t share_rows(const Problem& problem) {
    return problem.total_q + problem.batch * kTileRows;
  }
  static size_t shared_bytes(const Problem& problem, const KeySplit& split) {
    if (split.count == 1) return 0;
    return static_cast<size_t>(split.count * problem.num_heads * share_rows(problem) *
                               round_up(problem.head_dim, kPanel<C>)) *
           sizeof(C);
  }
  // The share of dq that the keys of range `part` give to the queries of one sequence and head.
  Matrix<C> share(const Sequence& seq, int64_t batch, int64_t head, int64_t part) const {
    char* const start = static_cast<char*>(params_.workspace) +
                        static_cast<size_t>(threads_) * thread_bytes(problem_, extent_, split_);
    const int64_t first = problem_.cu_seqlens_q == nullptr ? batch * seq.q_len : seq.q_begin;
    const int64_t row =
        (part * problem_.num_heads + head) * share_rows(problem_) + first + batch * kTileRows;
    const int64_t stride = round_up(problem_.head_dim, kPanel<C>);
    return {reinterpret_cast<C*>(start) + row * stride, stride};
  }

  void differentiate(int64_t pair, int64_t part, int thread) const {
    const int64_t batch = pair / problem_.num_heads_kv;
    const int64_t head_kv = pair % problem_.num_heads_kv;
    const Sequence seq = sequence_of(problem_, batch);
    Arena arena(static_cast<char*>(params_.workspace) +
                static_cast<size_t>(thread) * thread_bytes(problem_, extent_, split_));
    const BackwardScratch<C> scratch =
        BackwardScratch<C>::take(arena, problem_.head_dim, extent_.max_q, split_);
    const int64_t begin = smaller_of(part * split_.keys, seq.k_len);
    const int64_t end = smaller_of(begin + split_.keys, seq.k_len);
    clear_rows(scratch.dk, end - begin);
    clear_rows(scratch.dv, end - begin);
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      const bool whole = split_.count == 1;
      const Matrix<C> dq = whole ? scratch.dq : share(seq, batch, head, part);
      clear_rows(dq, round_up(seq.q_len, kTileRows));
      differentiate_head(scratch, dq, seq, head, begin, end);
      if (!whole) continue;
      const Rows<T> to = query_rows<T>(params_.dq, seq, head);
      for (int64_t i = 0; i < seq.q_len; ++i) store_row(dq.row(i), scale(), to.row(i));
    }
    const Rows<T> dk = key_rows<T>(params_.dk, seq, head_kv).from(begin);
    const Rows<T> dv = key_rows<T>(params_.dv, seq, head_kv).from(begin);
    for (int64_t j = 0; j < end - begin; ++j) {
      store_row(scratch.dk.row(j), scale(), dk.row(j));
      store_row(scratch.dv.row(j), C{1}, dv.row(j));
    }
  }

  // All queries of one head against the keys [begin, end).
  void differentiate_head(const BackwardScratch<C>& scratch, const Matrix<C>& dq,
                          const Sequence& seq, int64_t head, int64_t begin, int64_t end) const {
    const int64_t dim = problem_.head_dim;
    const int64_t head_kv = head / (problem_.num_heads / problem_.num_heads_kv);
    const Rows<const T> k = key_rows<const T>(params_.k, seq, head_kv);
    const Rows<const T> v = key_rows<const T>(params_.v, seq, head_kv);
    const int64_t first_query = first_query_of(seq, begin);
    for (int64_t q0 = first_query; q0 < seq.q_len; q0 += kBackwardBlockQ) {
      pack_queries(scratch, seq, head, q0);
    }
    for (int64_t k0 = begin; k0 < end; k0 += kBackwardBlockK) {
      KeyBlock<C> kv{scratch.k, scratch.v, scratch.k_packed, smaller_of(kBackwardBlockK, end - k0),
                     true};
      copy_rows(k.from(k0), kv.keys, dim, C{1}, scratch.k);
      copy_rows(v.from(k0), kv.keys, dim, C{1}, scratch.v);
      kv.finite = pack_rows(k.from(k0), kv.keys, dim, scratch.k_packed);
      const int64_t row = k0 - begin;
      for (int64_t q0 = first_query_of(seq, k0); q0 < seq.q_len; q0 += kBackwardBlockQ) {
        const Gradients<C> sum{{dq.row(q0), dq.stride},
                               {scratch.dk.row(row), scratch.dk.stride},
                               {scratch.dv.row(row), scratch.dv.stride}};
        differentiate_block<C, kExp2Degree<T>>(scratch.tile, kv, query_block(scratch, seq, q0), dim,
                                               visible_keys(problem_, seq, q0, k0, kv.keys), sum);
      }
    }
  }

  // The first query of the first query block that sees key `key` or one behind it.
  int64_t first_query_of(const Sequence& seq, int64_t key) const {
    return round_down(visible_keys(problem_, seq, 0, 0, seq.k_len).begin(key), kBackwardBlockQ);
  }

  QueryBlock<C> query_block(const BackwardScratch<C>& s, const Sequence& seq, int64_t q0) const {
    const int64_t dim = problem_.head_dim;
    const int64_t wide = round_up(dim, kPanel<C>);
    return {s.q_transposed + q0 * dim,
            s.dout_transposed + q0 * dim,
            s.q + q0 * wide,
            s.dout + q0 * wide,
            s.lse + q0,
            s.delta + q0,
            smaller_of(kBackwardBlockQ, seq.q_len - q0),
            s.finite[q0 / kBackwardBlockQ] != 0};
  }

  void pack_queries(const BackwardScratch<C>& to, const Sequence& seq, int64_t head,
                    int64_t q0) const {
    const int64_t dim = problem_.head_dim;
    const int64_t wide = round_up(dim, kPanel<C>);
    const int64_t queries = smaller_of(kBackwardBlockQ, seq.q_len - q0);
    const Rows<const T> q = query_rows<const T>(params_.q, seq, head).from(q0);
    const Rows<const T> dout = query_rows<const T>(params_.dout, seq, head).from(q0);
    const Rows<const T> out = query_rows<const T>(params_.out, seq, head).from(q0);
    pack_transposed(q, queries, dim, scale() * kLog2E<C>, to.q_transposed + q0 * dim);
    pack_transposed(dout, queries, dim, C{1}, to.dout_transposed + q0 * dim);
    const bool q_finite = pack_rows(q, queries, dim, to.q + q0 * wide);
    const bool dout_finite = pack_rows(dout, queries, dim, to.dout + q0 * wide);
    to.finite[q0 / kBackwardBlockQ] = q_finite && dout_finite;
    const float* lse = row_values(params_.lse, seq, head) + q0;
    const float* dlse = row_values(params_.dlse, seq, head);
    for (int64_t i = 0; i < round_up(queries, kPanel<C>); ++i) {
      const bool sees_keys = i < queries && lse[i] != -__builtin_inff();
      to.lse[q0 + i] = sees_keys ? static_cast<C>(lse[i]) * kLog2E<C> : kInfinity<C>;
      to.delta[q0 + i] = 0;
      if (!sees_keys) continue;
      to.delta[q0 + i] = dot(out.row(i), dout.row(i), dim);
      if (dlse != nullptr) to.delta[q0 + i] -= static_cast<C>(dlse[q0 + i]);
    }
  }

  // Adds the shares of dq of one block of queries, in the order of the keys, and writes them.
  void add_shares(int64_t batch, int64_t head, int64_t block) const {
    const Sequence seq = sequence_of(problem_, batch);
    const int64_t q0 = block * kBackwardBlockQ;
    const Matrix<C> sum = share(seq, batch, head, 0);
    const Rows<T> to = query_rows<T>(params_.dq, seq, head);
    for (int64_t i = q0; i < smaller_of(q0 + kBackwardBlockQ, seq.q_len); ++i) {
      for (int64_t part = 1; part < split_.count; ++part) {
        const C* term = share(seq, batch, head, part).row(i);
        for (int64_t d = 0; d < sum.stride; ++d) sum.row(i)[d] += term[d];
      }
      store_row(sum.row(i), scale(), to.row(i));
    }
  }

  C scale() const { return static_cast<C>(problem_.softmax_scale); }
  void store_row(const C* from, C factor, T* to) const {
    narrow(from, problem_.head_dim, factor, to);
  }

  const BackwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const KeySplit split_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
