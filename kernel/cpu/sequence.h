// Where the rows of one (sequence, head) lie, dense or varlen.
#pragma once

#include "gemm.h"
#include "params.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

struct Sequence {
  int64_t batch;
  int64_t q_begin, q_len;  // rows of the packed tensor when varlen, else 0 and seqlen_q
  int64_t k_begin, k_len;
};

inline Sequence sequence_of(const Problem& problem, int64_t batch) {
  if (problem.cu_seqlens_q == nullptr) return {batch, 0, problem.seqlen_q, 0, problem.seqlen_k};
  const int64_t q = problem.cu_seqlens_q[batch];
  const int64_t k = problem.cu_seqlens_k[batch];
  return {0, q, problem.cu_seqlens_q[batch + 1] - q, k, problem.cu_seqlens_k[batch + 1] - k};
}

// The keys that the queries [q0, ...) see of the keys [k0, k0 + keys).
inline Visible visible_keys(const Problem& problem, const Sequence& seq, int64_t q0, int64_t k0,
                            int64_t keys) {
  if (problem.band.right != 0) return {keys, keys};
  return {q0 + seq.k_len - seq.q_len - k0 + 1, keys};
}

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  FLASHTILE_INLINE T* row(int64_t i) const { return data + i * stride; }
  FLASHTILE_INLINE Rows from(int64_t i) const { return {row(i), stride}; }
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

// One fp32 per query row of a sequence and head; null when the view is absent.
inline float* row_values(const RowView& view, const Sequence& seq, int64_t head) {
  if (view.data == nullptr) return nullptr;
  return view.data + seq.batch * view.stride_batch + head * view.stride_head + seq.q_begin;
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
