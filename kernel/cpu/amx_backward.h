// Backward for bfloat16 on tiles: the plan of backward.h with the tile of amx_backward_tile.h. A
// task is one (sequence, key/value head).
//
// A tile product meets every number with every weight, so a causal call with an inf or NaN in q, k
// or dout goes through backward.h, which keeps it from the rows that do not see it.
#pragma once

#include "amx_backward_tile.h"
#include "backward.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kAmxBackwardBlockQ = 256;
constexpr int64_t kAmxBackwardBlockK = 128;

// What one thread needs for a task.
struct AmxBackwardScratch {
  BFloat16* q_columns;  // one query head: see AmxQueryBlock, the blocks one behind the other
  BFloat16* dout_columns;
  BFloat16* q_rows;
  BFloat16* dout_rows;
  float* lse;            // [queries]
  float* delta;          // [queries]
  Matrix<float> dq;      // [head_dim, queries]
  Matrix<float> dk, dv;  // [keys, head_dim]
  AmxKeyBlock kv;
  AmxBackwardTile tile;

  static AmxBackwardScratch take(Arena& arena, int64_t dim, const Extent& extent) {
    const int64_t wide = round_up(dim, kTilePair);
    const int64_t queries = round_up(larger_of(extent.max_q, 1), kTilePair);
    const int64_t keys = round_up(larger_of(extent.max_k, 1), kTilePair);
    const int64_t stride = kAmxBackwardBlockQ + kTilePair;
    AmxBackwardScratch s;
    s.q_columns = arena.take<BFloat16>(queries * wide);
    s.dout_columns = arena.take<BFloat16>(queries * wide);
    s.q_rows = arena.take<BFloat16>(queries * wide);
    s.dout_rows = arena.take<BFloat16>(queries * wide);
    s.lse = arena.take<float>(queries);
    s.delta = arena.take<float>(queries);
    s.dq = {arena.take<float>(wide * queries), queries};
    s.dk = {arena.take<float>(keys * wide), wide};
    s.dv = {arena.take<float>(keys * wide), wide};
    s.kv.k = {arena.take<BFloat16>(kAmxBackwardBlockK * wide), wide};
    s.kv.v = {arena.take<BFloat16>(kAmxBackwardBlockK * wide), wide};
    s.kv.k_columns = {arena.take<BFloat16>(wide * kAmxBackwardBlockK), kAmxBackwardBlockK};
    s.tile.s = {arena.take<float>(kAmxBackwardBlockK * stride), stride};
    s.tile.dp = {arena.take<float>(kAmxBackwardBlockK * stride), stride};
    s.tile.p = {arena.take<BFloat16>(kAmxBackwardBlockK * stride), stride};
    s.tile.ds = {arena.take<BFloat16>(kAmxBackwardBlockK * stride), stride};
    s.tile.pairs = arena.take<BFloat16>(kAmxBackwardBlockK * kAmxBackwardBlockQ);
    return s;
  }
};

class AmxBackward {
 public:
  AmxBackward(const BackwardParams& params, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        extent_(extent),
        threads_(threads),
        wide_(round_up(params.problem.head_dim, kTilePair)) {}

  static Scratch scratch(const Problem& problem, const Extent& extent, int threads) {
    const size_t own = static_cast<size_t>(threads) * thread_bytes(problem, extent);
    const size_t plain = Backward<BFloat16>::scratch(problem, extent, threads).minimum;
    const size_t bytes = own > plain ? own : plain;
    return {bytes, bytes};
  }

  void run() {
    if (problem_.band.right == 0 && !inputs_are_finite()) {
      Backward<BFloat16>(params_, extent_, threads_).run();
      return;
    }
    parallel_for(threads_, problem_.batch * problem_.num_heads_kv, true,
                 [&](int64_t pair, int thread) { differentiate(pair, thread); });
  }

 private:
  static size_t thread_bytes(const Problem& problem, const Extent& extent) {
    Arena arena(nullptr);
    AmxBackwardScratch::take(arena, problem.head_dim, extent);
    return arena.used();
  }

  bool inputs_are_finite() const {
    bool finite = true;
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    parallel_for(threads_, problem_.batch * problem_.num_heads, true, [&](int64_t task, int) {
      const Sequence seq = sequence_of(problem_, task / problem_.num_heads);
      const int64_t head = task % problem_.num_heads;
      const int64_t dim = problem_.head_dim;
      const auto k = key_rows<const BFloat16>(params_.k, seq, head / group);
      const auto q = query_rows<const BFloat16>(params_.q, seq, head);
      const auto dout = query_rows<const BFloat16>(params_.dout, seq, head);
      const bool clean = (head % group != 0 || all_finite(k, seq.k_len, dim)) &&
                         all_finite(q, seq.q_len, dim) && all_finite(dout, seq.q_len, dim);
      if (!clean) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
  }

  void differentiate(int64_t pair, int thread) const {
    const Sequence seq = sequence_of(problem_, pair / problem_.num_heads_kv);
    const int64_t head_kv = pair % problem_.num_heads_kv;
    const int64_t dim = problem_.head_dim;
    Arena arena(static_cast<char*>(params_.workspace) +
                static_cast<size_t>(thread) * thread_bytes(problem_, extent_));
    const AmxBackwardScratch scratch = AmxBackwardScratch::take(arena, dim, extent_);
    clear_rows(scratch.dk, round_up(seq.k_len, kTilePair));
    clear_rows(scratch.dv, round_up(seq.k_len, kTilePair));
    const int64_t group = problem_.num_heads / problem_.num_heads_kv;
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      clear_rows(scratch.dq, wide_);
      differentiate_head(scratch, seq, head);
      store_dq(scratch.dq, seq.q_len, query_rows<BFloat16>(params_.dq, seq, head));
    }
    const Rows<BFloat16> dk = key_rows<BFloat16>(params_.dk, seq, head_kv);
    const Rows<BFloat16> dv = key_rows<BFloat16>(params_.dv, seq, head_kv);
    for (int64_t j = 0; j < seq.k_len; ++j) {
      narrow(scratch.dk.row(j), dim, problem_.softmax_scale, dk.row(j));
      narrow(scratch.dv.row(j), dim, 1.0f, dv.row(j));
    }
  }

  void differentiate_head(const AmxBackwardScratch& scratch, const Sequence& seq,
                          int64_t head) const {
    const int64_t dim = problem_.head_dim;
    const int64_t head_kv = head / (problem_.num_heads / problem_.num_heads_kv);
    const auto k = key_rows<const BFloat16>(params_.k, seq, head_kv);
    const auto v = key_rows<const BFloat16>(params_.v, seq, head_kv);
    for (int64_t q0 = 0; q0 < seq.q_len; q0 += kAmxBackwardBlockQ) {
      pack_queries(scratch, seq, head, q0);
    }
    Tiles tiles;
    const float factor = problem_.softmax_scale * kLog2E<float>;
    for (int64_t k0 = 0; k0 < seq.k_len; k0 += kAmxBackwardBlockK) {
      const int64_t keys = smaller_of(kAmxBackwardBlockK, seq.k_len - k0);
      pack_left(k.from(k0), keys, dim, scratch.kv.k);
      pack_left(v.from(k0), keys, dim, scratch.kv.v);
      pack_left_transposed(k.from(k0), keys, dim, scratch.kv.k_columns);
      const int64_t first = visible_keys(problem_, seq, 0, 0, seq.k_len).begin(k0);
      for (int64_t q0 = round_down(first, kAmxBackwardBlockQ); q0 < seq.q_len;
           q0 += kAmxBackwardBlockQ) {
        const AmxGradients sum{{scratch.dq.data + q0, scratch.dq.stride},
                               {scratch.dk.row(k0), wide_},
                               {scratch.dv.row(k0), wide_}};
        differentiate_tiles(tiles, scratch.tile, scratch.kv, query_block(scratch, seq, q0), factor,
                            visible_keys(problem_, seq, q0, k0, keys), sum);
      }
    }
  }

  AmxQueryBlock query_block(const AmxBackwardScratch& s, const Sequence& seq, int64_t q0) const {
    const int64_t queries = smaller_of(kAmxBackwardBlockQ, seq.q_len - q0);
    const int64_t padded = round_up(queries, kTilePair);
    return {{s.q_columns + q0 * wide_, wide_},
            {s.dout_columns + q0 * wide_, wide_},
            {s.q_rows + q0 * wide_, padded},
            {s.dout_rows + q0 * wide_, padded},
            s.lse + q0,
            s.delta + q0,
            queries};
  }

  void pack_queries(const AmxBackwardScratch& to, const Sequence& seq, int64_t head,
                    int64_t q0) const {
    const int64_t dim = problem_.head_dim;
    const AmxQueryBlock block = query_block(to, seq, q0);
    const auto q = query_rows<const BFloat16>(params_.q, seq, head).from(q0);
    const auto dout = query_rows<const BFloat16>(params_.dout, seq, head).from(q0);
    const auto out = query_rows<const BFloat16>(params_.out, seq, head).from(q0);
    pack_right_transposed(q, block.queries, dim, block.q_columns);
    pack_right_transposed(dout, block.queries, dim, block.dout_columns);
    pack_right(q, block.queries, dim, block.q_rows);
    pack_right(dout, block.queries, dim, block.dout_rows);
    const float* lse = row_values(params_.lse, seq, head) + q0;
    const float* dlse = row_values(params_.dlse, seq, head);
    for (int64_t i = 0; i < round_up(block.queries, kTilePair); ++i) {
      const bool sees_keys = i < block.queries && lse[i] != -__builtin_inff();
      to.lse[q0 + i] = sees_keys ? lse[i] * kLog2E<float> : kInfinity<float>;
      to.delta[q0 + i] = 0;
      if (!sees_keys) continue;
      to.delta[q0 + i] = dot(out.row(i), dout.row(i), dim);
      if (dlse != nullptr) to.delta[q0 + i] -= dlse[q0 + i];
    }
  }

  // dq = softmax_scale * transposed sums.
  void store_dq(const Matrix<float>& sum, int64_t queries, const Rows<BFloat16>& to) const {
    constexpr int kWidth = kLanes<float>;
    for (int64_t i = 0; i < queries; i += kWidth) {
      for (int64_t d = 0; d < problem_.head_dim; d += kWidth) {
        Vec<float> square[kWidth];
        for (int n = 0; n < kWidth; ++n) square[n] = load(sum.row(d + n) + i);
        transpose<float>(square);
        for (int n = 0; n < smaller_of(kWidth, queries - i); ++n) {
          write_some(to.row(i + n) + d, square[n] * problem_.softmax_scale, problem_.head_dim - d);
        }
      }
    }
  }

  const BackwardParams& params_;
  const Problem& problem_;
  const Extent extent_;
  const int threads_;
  const int64_t wide_;  // head_dim in whole tiles
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
