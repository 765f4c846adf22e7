// Where the rows in use of one (sequence, head) lie, dense or varlen.
#pragma once

#include "params.h"
#include "visible.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

struct Sequence {
  int64_t batch;           // what stride_batch is multiplied with: 0 when varlen
  int64_t q_begin, q_len;  // rows of the packed tensor when varlen, else 0 and up
  int64_t k_begin, k_len;
  Visible visible;
};

inline Sequence sequence_of(const Problem& problem, int64_t index) {
  Sequence seq = {index, 0, problem.seqlen_q, 0, problem.seqlen_k, {}};
  if (problem.is_varlen()) {
    const int32_t* const q = problem.cu_seqlens_q + index;
    const int32_t* const k = problem.cu_seqlens_k + index;
    seq = {0, q[0], q[1] - q[0], k[0], k[1] - k[0], {}};
  }
  if (problem.seqused_q != nullptr) seq.q_len = problem.seqused_q[index];
  if (problem.seqused_k != nullptr) seq.k_len = problem.seqused_k[index];
  seq.visible = visible_of(problem, seq.q_len, seq.k_len);
  return seq;
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
