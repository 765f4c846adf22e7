// Rows of a result that no sequence uses: behind seqused, and behind the last sequence. They are
// written as 0, their log-sum-exp as -inf.
#pragma once

#include <cstring>
#include <limits>

#include "params.h"

namespace flashtile::cpu {

// Calls visit(batch, first row, rows) for every run of unused rows, of the query or of
// the key tensors.
template <class Visit>
void for_each_unused(int64_t batch, int64_t rows, const int32_t* cu_seqlens, const int32_t* used,
                     const Visit& visit) {
  for (int64_t b = 0; used != nullptr && b < batch; ++b) {
    if (cu_seqlens == nullptr) {
      visit(b, used[b], rows - used[b]);
    } else {
      const int64_t first = int64_t{cu_seqlens[b]} + used[b];
      visit(0, first, cu_seqlens[b + 1] - first);
    }
  }
  if (cu_seqlens != nullptr) visit(0, cu_seqlens[batch], rows - cu_seqlens[batch]);
}

template <class Visit>
void for_each_unused_query(const Problem& problem, const Visit& visit) {
  for_each_unused(problem.batch, problem.rows_q(), problem.cu_seqlens_q, problem.seqused_q, visit);
}

template <class Visit>
void for_each_unused_key(const Problem& problem, const Visit& visit) {
  for_each_unused(problem.batch, problem.rows_k(), problem.cu_seqlens_k, problem.seqused_k, visit);
}

// A tensor that is written; every dtype's 0 is made of zero bytes.
struct Result {
  View view;
  int64_t heads;
  size_t row_bytes;  // of one head
  size_t element_bytes;

  void clear(int64_t batch, int64_t first, int64_t rows) const {
    for (int64_t r = first; r < first + rows; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = batch * view.stride_batch + r * view.stride_seq + h * view.stride_head;
        std::memset(static_cast<char*>(view.data) + at * static_cast<int64_t>(element_bytes), 0,
                    row_bytes);
      }
    }
  }
};

inline Result result_of(const View& view, Dtype dtype, int64_t heads, int64_t dim) {
  constexpr size_t kBytes[] = {2, 2, 4, 8};
  const size_t bytes = kBytes[static_cast<int>(dtype)];
  return {view, heads, static_cast<size_t>(dim) * bytes, bytes};
}

template <class Number>
void fill_minus_infinity(Number* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = -std::numeric_limits<Number>::infinity();
}

inline void clear_unused(const ForwardParams& params) {
  const Problem& p = params.problem;
  const Result out = result_of(params.out, p.dtype, p.num_heads, p.head_dim_v);
  for_each_unused_query(p, [&](int64_t batch, int64_t first, int64_t rows) {
    out.clear(batch, first, rows);
    for (int64_t h = 0; params.lse.data != nullptr && h < p.num_heads; ++h) {
      const int64_t at = batch * params.lse.stride_batch + h * params.lse.stride_head + first;
      if (p.lse_is_double) {
        fill_minus_infinity(reinterpret_cast<double*>(params.lse.data) + at, rows);
      } else {
        fill_minus_infinity(params.lse.data + at, rows);
      }
    }
  });
}

inline void clear_unused(const BackwardParams& params) {
  const Problem& p = params.problem;
  const Result dq = result_of(params.dq, p.dtype, p.num_heads, p.head_dim);
  const Result dk = result_of(params.dk, p.dtype, p.num_heads_kv, p.head_dim);
  const Result dv = result_of(params.dv, p.dtype, p.num_heads_kv, p.head_dim_v);
  for_each_unused_query(
      p, [&](int64_t batch, int64_t first, int64_t rows) { dq.clear(batch, first, rows); });
  for_each_unused_key(p, [&](int64_t batch, int64_t first, int64_t rows) {
    dk.clear(batch, first, rows);
    dv.clear(batch, first, rows);
  });
}

}  // namespace flashtile::cpu
