// Gradients of what scores meet: biases, slopes and sinks, after those of q, k and v.
//
// A bias that every head has its own part of gets its gradient from the tiles of the backward pass
// (transposed_scores.h). One that is repeated gets it from many heads, so each tile of it is one
// task here, which computes P and dS again for every sequence and head that adds to it, in order:
// no bit depends on the number of threads, and no memory grows with the product of the lengths.
#pragma once

#include "arena.h"
#include "backward_statistics.h"
#include "engine.h"
#include "parallel.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

inline void set_number(const ScoreView& view, int64_t offset, double number) {
  with_numbers(view, [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    using C = Compute<T>;
    write_some(data + offset, splat(static_cast<C>(number)), 1);
  });
}

// The rows that a block of queries reads, and what their deltas are made of.
template <class T>
struct QueryRows {
  Rows<const T> q, out, dout;
  RowValues lse, dlse;

  QueryRows(const BackwardParams& params, const Sequence& seq, int64_t head, int64_t q0)
      : q(query_rows<const T>(params.q, seq, head).from(q0)),
        out(query_rows<const T>(params.out, seq, head).from(q0)),
        dout(query_rows<const T>(params.dout, seq, head).from(q0)),
        lse(row_values(params.problem, params.lse, seq, head).from(q0)),
        dlse(row_values(params.problem, params.dlse, seq, head).from(q0)) {}

  Compute<T> delta(int64_t i, int64_t dim_v) const {
    const Compute<T> slope = dot(out.row(i), dout.row(i), dim_v);
    return slope - (dlse.exists() ? static_cast<Compute<T>>(dlse.get(i)) : Compute<T>{0});
  }
};

template <class Products>
class ScoreGradients {
 public:
  using T = typename Products::Storage;
  using C = Compute<T>;

  ScoreGradients(const BackwardParams& params, const Scores& scores, const Extent& extent,
                 int threads)
      : params_(params),
        problem_(params.problem),
        scores_(scores),
        extent_(extent),
        threads_(threads) {}

  static size_t scratch(const Problem& problem, const Scores& scores, int threads) {
    if (!scores.dbias[0].exists() && !scores.dbias[1].exists()) return 0;
    return static_cast<size_t>(threads) * thread_bytes(problem, scores);
  }

  // `parts`: [batch, num_heads, count], summed up in order. Before run().
  void store_slopes(const double* parts, int64_t count) const {
    const ScoreView& to = scores_.dalibi_slopes;
    if (!to.exists()) return;
    for_each_target(to, [&](int64_t offset, const Range& batches, const Range& heads) {
      double sum = 0;
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        for (int64_t h = heads.begin; h < heads.end; ++h) {
          const double* const of = parts + (b * problem_.num_heads + h) * count;
          for (int64_t n = 0; n < count; ++n) sum += of[n];
        }
      }
      set_number(to, offset, sum);
    });
  }

  // Before the backward pass: 0 where no tile writes.
  void clear() const {
    const bool all_tiles = !problem_.is_varlen() && problem_.seqused_q == nullptr &&
                           problem_.seqused_k == nullptr && problem_.band.left < 0 &&
                           problem_.band.right < 0;
    for (const ScoreView& to : scores_.dbias) {
      if (all_tiles || !to.exists() || !is_of_one_head(problem_, to)) continue;
      with_numbers(to, [&](auto* data) { clear(to, data); });
    }
  }

  void run() const {
    if (scores_.dsink.exists()) store_sinks();
    for (const ScoreView& to : scores_.dbias) {
      if (to.exists() && !is_of_one_head(problem_, to)) differentiate(to);
    }
  }

 private:
  static constexpr int64_t kBlockQ = Products::kBlockQ;
  static constexpr int64_t kBlockK = Products::kBlockK;
  static constexpr int64_t kStride = kBlockQ + kLanes<C>;
  static constexpr bool kFlush = sizeof(C) == sizeof(float);

  struct Memory {
    typename Products::Tile tile;
    typename Products::Queries queries;
    Statistics<C> statistics;
    Matrix<C> sum;  // [keys, queries]

    static Memory take(Arena& arena, const Problem& problem, const Scores& scores) {
      Memory memory = {};
      memory.tile = Products::Tile::take(arena, problem, scores);
      memory.queries = Products::Queries::take(arena, problem, kBlockQ);
      memory.statistics = Statistics<C>::take(arena, kBlockQ, problem.lse_is_double);
      memory.sum = {arena.take<C>(kBlockK * kStride), kStride};
      return memory;
    }
  };
  static size_t thread_bytes(const Problem& problem, const Scores& scores) {
    Arena arena(nullptr);
    Memory::take(arena, problem, scores);
    return arena.used();
  }

  // Calls visit(offset, batches, heads) for every entry of the first two dimensions; the ranges
  // are what adds up to it.
  template <class Visit>
  void for_each_target(const ScoreView& view, const Visit& visit) const {
    const Range batches = {0, problem_.batch}, heads = {0, problem_.num_heads};
    const int64_t b_targets = view.stride_batch == 0 ? 1 : problem_.batch;
    const int64_t h_targets = view.stride_head == 0 ? 1 : problem_.num_heads;
    for (int64_t b = 0; b < b_targets; ++b) {
      for (int64_t h = 0; h < h_targets; ++h) {
        visit(b * view.stride_batch + h * view.stride_head,
              view.stride_batch == 0 ? batches : Range{b, b + 1},
              view.stride_head == 0 ? heads : Range{h, h + 1});
      }
    }
  }

  template <class Number>
  void clear(const ScoreView& to, Number* data) const {
    parallel_for(threads_, problem_.batch * problem_.num_heads, kFlush, [&](int64_t task, int) {
      Number* const first = data + task / problem_.num_heads * to.stride_batch +
                            task % problem_.num_heads * to.stride_head;
      for (int64_t i = 0; i < to.seqlen_q; ++i) {
        for (int64_t j = 0; j < to.seqlen_k; ++j)
          first[i * to.stride_q + j * to.stride_k] = Number{};
      }
    });
  }

  // -sum of exp(sink - lse) delta.
  void store_sinks() const {
    const ScoreView& to = scores_.dsink;
    const bool by_row = to.stride_q != 0;
    for_each_target(to, [&](int64_t offset, const Range& batches, const Range& heads) {
      for (int64_t i = 0; by_row && i < problem_.rows_q(); ++i)
        set_number(to, offset + i * to.stride_q, 0);
      double sum = 0;
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        const Sequence seq = sequence_of(problem_, b);
        for (int64_t i = 0; i < seq.q_len; ++i) {
          double row = 0;
          for (int64_t h = heads.begin; h < heads.end; ++h) row += sink_gradient(seq, h, i);
          sum += row;
          if (by_row) add_to_row(to, offset + (seq.q_begin + i) * to.stride_q, row);
        }
      }
      if (!by_row) set_number(to, offset, sum);
    });
  }
  static void add_to_row(const ScoreView& to, int64_t offset, double row) {
    set_number(to, offset, number_of(to, offset) + row);
  }
  double sink_gradient(const Sequence& seq, int64_t head, int64_t query) const {
    const QueryRows<T> rows(params_, seq, head, query);
    const double sink = HeadScores<C>(problem_, scores_, seq, head).sink(query);
    if (sink == -__builtin_inf()) return 0;
    return -__builtin_exp(sink - rows.lse.get(0)) *
           static_cast<double>(rows.delta(0, problem_.head_dim_v));
  }

  // A dimension of a bias: as many blocks as it has, or one for all that adds up.
  struct Blocks {
    int64_t size, block, stride;
    int64_t tasks() const { return stride == 0 ? 1 : (size + block - 1) / block; }
    Range of(int64_t task) const {
      return stride == 0 ? Range{0, size}
                         : Range{task * block, smaller_of((task + 1) * block, size)};
    }
  };

  void differentiate(const ScoreView& to) const {
    const Blocks q = {to.stride_q == 0 ? extent_.max_q : to.seqlen_q, kBlockQ, to.stride_q};
    const Blocks k = {to.stride_k == 0 ? extent_.max_k : to.seqlen_k, kBlockK, to.stride_k};
    for_each_target(to, [&](int64_t offset, const Range& batches, const Range& heads) {
      parallel_for(threads_, q.tasks() * k.tasks(), kFlush, [&](int64_t task, int thread) {
        Arena arena(static_cast<char*>(params_.workspace) +
                    static_cast<size_t>(thread) * thread_bytes(problem_, scores_));
        const Memory memory = Memory::take(arena, problem_, scores_);
        const Area area = {q.of(task / k.tasks()), k.of(task % k.tasks()), batches, heads};
        clear_sum(memory.sum);
        add(area, memory);
        store_sum(to, offset, area, memory.sum);
      });
    });
  }
  struct Area {
    Range queries, keys, batches, heads;
  };
  static void clear_sum(const Matrix<C>& sum) {
    for (int64_t i = 0; i < kBlockK * kStride; ++i) sum.data[i] = 0;
  }

  // sum += the gradients of the logits of an area, block over block.
  void add(const Area& area, const Memory& memory) const {
    for (int64_t b = area.batches.begin; b < area.batches.end; ++b) {
      const Sequence seq = sequence_of(problem_, b);
      for (int64_t h = area.heads.begin; h < area.heads.end; ++h) {
        const HeadScores<C> scores(problem_, scores_, seq, h);
        Products products(problem_, scores, memory.queries, memory.tile);
        for (int64_t q0 = area.queries.begin; q0 < smaller_of(area.queries.end, seq.q_len);
             q0 += kBlockQ) {
          add_queries(products, seq, h, q0, area.keys, memory);
        }
      }
    }
  }
  void add_queries(Products& products, const Sequence& seq, int64_t head, int64_t q0,
                   const Range& keys, const Memory& memory) const {
    const int64_t queries = smaller_of(kBlockQ, seq.q_len - q0), dim_v = problem_.head_dim_v;
    const Range all = seq.visible.keys_of_group(q0, queries);
    const Range seen = {larger_of(keys.begin, round_down(all.begin, kBlockK)),
                        smaller_of(keys.end, all.end)};
    if (seen.empty()) return;
    const QueryRows<T> rows(params_, seq, head, q0);
    products.pack_queries(0, queries, rows.q, rows.dout);
    const Statistics<C> statistics = memory.statistics.block(0, queries);
    for (int64_t i = 0; i < queries; ++i) statistics.set(i, rows.lse.get(i), rows.delta(i, dim_v));
    const int64_t head_kv = head / problem_.group();
    const KeyRows<T> kv = {key_rows<const T>(params_.k, seq, head_kv),
                           key_rows<const T>(params_.v, seq, head_kv)};
    refine_statistics(products, kv, seq.visible, q0, 0, statistics);
    for (int64_t k0 = seen.begin; k0 < seen.end; k0 += kBlockK) {
      const int64_t count = smaller_of(kBlockK, seq.k_len - k0);
      const Visible visible = seq.visible.block(q0, queries, k0, count);
      if (visible.queries_of_group(0, count).empty()) continue;
      products.pack_keys(kv.k.from(k0), kv.v.from(k0), count);
      const Matrix<C>& change = products.logit_gradients(0, {q0, k0}, visible, statistics);
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < queries; i += kLanes<C>)
          store(memory.sum.row(j) + i, load(memory.sum.row(j) + i) + load(change.row(j) + i));
      }
    }
  }

  // The sum of a block, or of all blocks where a dimension adds up: then it is one row, one column.
  void store_sum(const ScoreView& to, int64_t offset, const Area& area,
                 const Matrix<C>& sum) const {
    const bool sums_q = to.stride_q == 0, sums_k = to.stride_k == 0;
    const int64_t queries = sums_q ? 1 : area.queries.end - area.queries.begin;
    const int64_t keys = sums_k ? 1 : area.keys.end - area.keys.begin;
    with_numbers(to, [&](auto* data) {
      for (int64_t i = 0; i < queries; ++i) {
        for (int64_t j = 0; j < keys; ++j) {
          C total = 0;
          for (int64_t r = j; r < (sums_k ? kBlockK : j + 1); ++r) {
            for (int64_t c = i; c < (sums_q ? kBlockQ : i + 1); ++c) total += sum.row(r)[c];
          }
          auto* const at = data + offset + (sums_q ? 0 : area.queries.begin + i) * to.stride_q +
                           (sums_k ? 0 : area.keys.begin + j) * to.stride_k;
          using Number = std::remove_reference_t<decltype(*at)>;
          write_some(at, splat(static_cast<Compute<Number>>(total)), 1);
        }
      }
    });
  }

  const BackwardParams& params_;
  const Problem& problem_;
  const Scores& scores_;
  const Extent extent_;
  const int threads_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
