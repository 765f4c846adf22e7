// Writes new keys and values into a cache, and rotates them and the queries on the way.
//
// A task is one new row of a sequence, or one query row: all its heads.
#pragma once

#include "cache.h"
#include "parallel.h"
#include "sequence.h"
#include "storage.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class T>
class Append {
 public:
  using C = Compute<T>;

  explicit Append(const AppendParams& params)
      : params_(params),
        problem_(params.problem),
        cache_(params.problem.cache),
        rotary_(params.rotary) {}

  void run(int threads) const {
    const int64_t rows = most_rows(cache_.cu_seqlens_new, cache_.seqlen_new);
    parallel_for(threads, problem_.batch * rows, false,
                 [&](int64_t task, int) { append(task / rows, task % rows); });
    if (params_.q.data == nullptr) return;
    const int64_t queries = most_rows(problem_.cu_seqlens_q, problem_.seqlen_q);
    parallel_for(threads, problem_.batch * queries, false,
                 [&](int64_t task, int) { rotate_query(task / queries, task % queries); });
  }

 private:
  // Rows of the longest sequence.
  int64_t most_rows(const int32_t* cu_seqlens, int64_t seqlen) const {
    if (cu_seqlens == nullptr) return seqlen;
    int64_t most = 0;
    for (int64_t b = 0; b < problem_.batch; ++b)
      most = larger_of(most, int64_t{cu_seqlens[b + 1]} - cu_seqlens[b]);
    return most;
  }

  static T* row_of(const View& view, int64_t batch, int64_t row, int64_t head) {
    return static_cast<T*>(view.data) + batch * view.stride_batch + row * view.stride_seq +
           head * view.stride_head;
  }

  // New row i of a sequence, if the cache has a place for it.
  void append(int64_t sequence, int64_t i) const {
    const NewPlace place = new_place(params_, sequence, i);
    if (place.page < 0) return;
    const int64_t batch = cache_.cu_seqlens_new == nullptr ? sequence : 0;
    const int64_t from = new_rows(cache_, sequence).begin + i;
    for (int64_t head = 0; head < problem_.num_heads_kv; ++head) {
      rotate(row_of(params_.k_new, batch, from, head), place.position,
             row_of(params_.k_cache, place.page, place.row, head));
      __builtin_memcpy(row_of(params_.v_cache, place.page, place.row, head),
                       row_of(params_.v_new, batch, from, head),
                       static_cast<size_t>(problem_.head_dim_v) * sizeof(T));
    }
  }

  void rotate_query(int64_t sequence, int64_t i) const {
    const bool packed = problem_.is_varlen();
    const int64_t begin = packed ? problem_.cu_seqlens_q[sequence] : 0;
    const int64_t end = packed ? problem_.cu_seqlens_q[sequence + 1] : problem_.seqlen_q;
    if (begin + i >= end) return;
    const int64_t position = query_position(params_, sequence, i);
    const int64_t batch = packed ? 0 : sequence;
    for (int64_t head = 0; head < problem_.num_heads; ++head) {
      T* const to = row_of(params_.q_out, batch, begin + i, head);
      if (position < rotary_.rows) {
        rotate(row_of(params_.q, batch, begin + i, head), position, to);
      } else {
        const Vec<C> nan = splat(static_cast<C>(__builtin_nan("")));
        for (int64_t d = 0; d < problem_.head_dim; d += kLanes<C>)
          write_some(to + d, nan, problem_.head_dim - d);
      }
    }
  }

  // One row of head_dim numbers, which may stay where it is.
  void rotate(const T* from, int64_t position, T* to) const {
    __builtin_memmove(to, from, static_cast<size_t>(problem_.head_dim) * sizeof(T));
    if (rotary_.cos == nullptr) return;
    const int64_t half = rotary_.dim / 2;
    const T* const cos = static_cast<const T*>(rotary_.cos) + position * rotary_.stride;
    const T* const sin = static_cast<const T*>(rotary_.sin) + position * rotary_.stride;
    for (int64_t d = 0; d < half; ++d) {
      const int64_t first = rotary_.halves ? d : 2 * d,
                    second = rotary_.halves ? d + half : first + 1;
      const C x = number(to + first), y = number(to + second);
      const C c = number(cos + d), s = number(sin + d);
      write_some(to + first, splat(x * c - y * s), 1);
      write_some(to + second, splat(x * s + y * c), 1);
    }
  }

  static C number(const T* from) { return read_some(from, 1)[0]; }

  const AppendParams& params_;
  const Problem& problem_;
  const Cache& cache_;
  const Rotary& rotary_;
};

template <class T>
void append_kv(const AppendParams& params, int threads) {
  Append<T>(params).run(threads);
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
