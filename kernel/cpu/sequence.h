// Where the valid rows of one (sequence, head) lie: dense, varlen or in a cache.
#pragma once

#include <type_traits>

#include "cache.h"
#include "params.h"
#include "storage.h"
#include "visible.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

struct Sequence {
  int64_t batch;           // what stride_batch is multiplied with: 0 when varlen
  int64_t q_begin, q_len;  // rows of the packed tensor when varlen, else 0 and up
  int64_t k_begin, k_len;  // in a cache: rows of the sequence, behind its left padding
  Visible visible;
  int64_t index;  // of the sequence
};

inline Sequence sequence_of(const Problem& problem, int64_t index) {
  Sequence seq = {index, 0, problem.seqlen_q, 0, problem.seqlen_k, {}, index};
  if (problem.is_varlen()) {
    const int32_t* const q = problem.cu_seqlens_q + index;
    seq = {0, q[0], q[1] - q[0], 0, 0, {}, index};
  }
  if (problem.seqused_q != nullptr) seq.q_len = problem.seqused_q[index];
  if (problem.cache.exists()) {
    const CacheRows rows = cache_rows(problem, index);
    seq.k_begin = rows.begin;
    seq.k_len = rows.count;
  } else {
    if (problem.is_varlen()) {
      const int32_t* const k = problem.cu_seqlens_k + index;
      seq.k_begin = k[0];
      seq.k_len = k[1] - k[0];
    }
    if (problem.seqused_k != nullptr) seq.k_len = problem.seqused_k[index];
  }
  seq.visible = visible_of(problem, seq.q_len, seq.k_len);
  return seq;
}

template <class T>
struct Rows {
  using Number = std::remove_const_t<T>;
  T* data;
  int64_t stride;
  FLASHTILE_INLINE T* row(int64_t i) const { return data + i * stride; }
  FLASHTILE_INLINE Rows from(int64_t i) const { return {row(i), stride}; }
};

// Rows that lie anywhere, as those of a cache do.
template <class T>
struct RowList {
  using Number = std::remove_const_t<T>;
  T* const* list;
  FLASHTILE_INLINE T* row(int64_t i) const { return list[i]; }
  FLASHTILE_INLINE RowList from(int64_t i) const { return {list + i}; }
};

// Row 0 of a head, `begin` rows into the tensor. A tensor without elements may have no memory.
template <class T>
inline Rows<T> rows_of(const View& view, int64_t batch, int64_t begin, int64_t head) {
  T* const data = static_cast<T*>(view.data);
  if (data == nullptr) return {nullptr, 0};
  return {data + batch * view.stride_batch + begin * view.stride_seq + head * view.stride_head,
          view.stride_seq};
}

// The query (key) rows of one sequence and head.
template <class T>
inline Rows<T> query_rows(const View& view, const Sequence& seq, int64_t head) {
  return rows_of<T>(view, seq.batch, seq.q_begin, head);
}
template <class T>
inline Rows<T> key_rows(const View& view, const Sequence& seq, int64_t head) {
  return rows_of<T>(view, seq.batch, seq.k_begin, head);
}

// The keys (values) `keys` of a sequence in a cache. Each page is looked up once.
template <class T>
inline void list_keys(const Problem& problem, const View& view, const Sequence& seq, int64_t head,
                      const Range& keys, T** list) {
  const Cache& cache = problem.cache;
  for (int64_t i = keys.begin; i < keys.end;) {
    const int64_t row = seq.k_begin + i, block = row / cache.page_size;
    const int64_t end = smaller_of(keys.end, (block + 1) * cache.page_size - seq.k_begin);
    const int64_t page = readable_page(cache, seq.index, block);
    T* from = static_cast<T*>(view.data) + page * view.stride_batch + head * view.stride_head +
              (row - block * cache.page_size) * view.stride_seq;
    for (; i < end; ++i, from += view.stride_seq) *list++ = from;
  }
}

// Those of one sequence and head.
inline RowValues row_values(const Problem& problem, const RowView& view, const Sequence& seq,
                            int64_t head) {
  const RowValues all = {view.data, problem.lse_is_double};
  return all.from(seq.batch * view.stride_batch + head * view.stride_head + seq.q_begin);
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
