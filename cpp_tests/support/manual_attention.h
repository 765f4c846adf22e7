// Manual attention in plain loops: softmax(scale * Q K^T + mask) V and its gradients, one sequence
// and head at a time, the score matrix written out. It shares no code with the library.
//
// One function computes both sides of the error bound. In fp64 it is the truth. In another dtype it
// rounds where plain torch does: after each product (accumulated in fp32), after scaling, after
// softmax. The backward starts from the rounded out, which is all that a backward is given. GQA
// repeats the kv heads and sums their gradients before rounding them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "mask.h"
#include "numbers.h"

namespace flashtile::test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// [rows, cols] of doubles, zero at first.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t rows, int64_t cols)
      : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}
  double& operator()(int64_t r, int64_t c) { return data[static_cast<size_t>(r * cols + c)]; }
  double operator()(int64_t r, int64_t c) const { return data[static_cast<size_t>(r * cols + c)]; }
};

// Where the rows of a sequence that are in use lie in the tensors below. No other row is read: its
// results are 0, its LSE -inf.
struct Span {
  int64_t row_q = 0, seqlen_q = 0, row_k = 0, seqlen_k = 0;
};

// Dense copies of the tensors: index (row * heads + head) * dim + d, where dim is head_dim for q
// and k, head_dim_v for v and dout; rows of all sequences.
struct AttentionInput {
  std::vector<Span> sequences;
  int heads = 1, heads_kv = 1, head_dim = 1, head_dim_v = 1;
  double softmax_scale = 1.0;
  Mask mask;
  std::vector<double> q, k, v;
  bool backward = true;
  std::vector<double> dout;
  std::vector<double> dlse;  // index row * heads + head; empty: zero
};

struct AttentionOutput {
  std::vector<double> out, lse, dq, dk, dv;  // lse: index row * heads + head
};

inline Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.cols; ++c) t(c, r) = a(r, c);
  }
  return t;
}

inline void round_all(Matrix& a, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return;
  for (double& x : a.data) x = round_to(dtype, x);
}

// a b, summed in Sum.
template <class Sum>
Matrix product_in(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  std::vector<Sum> row(static_cast<size_t>(c.cols)), other(b.data.begin(), b.data.end());
  for (int64_t i = 0; i < a.rows; ++i) {
    std::fill(row.begin(), row.end(), Sum{0});
    for (int64_t k = 0; k < a.cols; ++k) {
      const Sum factor = static_cast<Sum>(a(i, k));
      const Sum* __restrict from = other.data() + k * b.cols;
      Sum* __restrict to = row.data();
      for (int64_t j = 0; j < b.cols; ++j) to[j] += factor * from[j];
    }
    std::copy(row.begin(), row.end(), c.data.begin() + i * c.cols);
  }
  return c;
}

// round(a b)
inline Matrix product(const Matrix& a, const Matrix& b, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return product_in<double>(a, b);
  Matrix c = product_in<float>(a, b);
  round_all(c, dtype);
  return c;
}

// Rows [first, first + count) of one head.
inline Matrix rows_of(const std::vector<double>& tensor, int64_t first, int64_t count, int heads,
                      int head, int dim) {
  Matrix m(count, dim);
  for (int64_t r = 0; r < count; ++r) {
    for (int d = 0; d < dim; ++d)
      m(r, d) = tensor[static_cast<size_t>(((first + r) * heads + head) * dim + d)];
  }
  return m;
}

inline void add_rows(const Matrix& m, int64_t first, int heads, int head,
                     std::vector<double>& tensor) {
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t d = 0; d < m.cols; ++d) {
      tensor[static_cast<size_t>(((first + r) * heads + head) * m.cols + d)] += m(r, d);
    }
  }
}

// Scores become probabilities in place, 0 where visible(i, j) is false; returns the log of each
// row's sum. A row that sees no key gets zeros and -inf.
template <class Visible>
std::vector<double> softmax_rows(Matrix& s, const Visible& visible, Dtype dtype) {
  std::vector<double> lse(static_cast<size_t>(s.rows), -kInfinity);
  std::vector<int64_t> seen;
  for (int64_t i = 0; i < s.rows; ++i) {
    seen.clear();
    for (int64_t j = 0; j < s.cols; ++j) {
      if (visible(i, j)) {
        seen.push_back(j);
      } else {
        s(i, j) = 0.0;
      }
    }
    if (seen.empty()) continue;
    double top = -kInfinity, sum = 0.0;
    for (const int64_t j : seen) top = s(i, j) > top || std::isnan(s(i, j)) ? s(i, j) : top;
    for (const int64_t j : seen) sum += std::exp(s(i, j) - top);
    for (const int64_t j : seen) s(i, j) = round_to(dtype, std::exp(s(i, j) - top) / sum);
    lse[static_cast<size_t>(i)] = top + std::log(sum);
  }
  return lse;
}

// dS = P * (dP - rowsum(out * dout) + dLSE), in place of dP. dlse: one number a row.
inline void softmax_backward(const Matrix& p, const Matrix& out, const Matrix& dout,
                             const std::vector<double>& dlse, Dtype dtype, Matrix& dp) {
  for (int64_t i = 0; i < p.rows; ++i) {
    double delta = -dlse[static_cast<size_t>(i)];
    for (int64_t d = 0; d < out.cols; ++d) delta += out(i, d) * dout(i, d);
    for (int64_t j = 0; j < p.cols; ++j) {
      dp(i, j) = p(i, j) == 0.0 ? 0.0 : round_to(dtype, p(i, j) * (dp(i, j) - delta));
    }
  }
}

inline void attend(const AttentionInput& in, const Span& span, int head, Dtype dtype,
                   AttentionOutput& result) {
  const int kv_head = head / (in.heads / in.heads_kv);
  const Matrix q = rows_of(in.q, span.row_q, span.seqlen_q, in.heads, head, in.head_dim);
  const Matrix k = rows_of(in.k, span.row_k, span.seqlen_k, in.heads_kv, kv_head, in.head_dim);
  const Matrix v = rows_of(in.v, span.row_k, span.seqlen_k, in.heads_kv, kv_head, in.head_dim_v);
  const auto scaled = [&](Matrix m) {
    for (double& x : m.data) x = round_to(dtype, x * in.softmax_scale);
    return m;
  };
  Matrix p = scaled(product(q, transposed(k), dtype));
  const auto visible = [&](int64_t i, int64_t j) {
    return sees(in.mask, span.seqlen_q, span.seqlen_k, i, j);
  };
  const std::vector<double> lse = softmax_rows(p, visible, dtype);
  const Matrix out = product(p, v, dtype);
  add_rows(out, span.row_q, in.heads, head, result.out);
  const auto row_index = [&](int64_t i) {
    return static_cast<size_t>((span.row_q + i) * in.heads + head);
  };
  for (int64_t i = 0; i < span.seqlen_q; ++i)
    result.lse[row_index(i)] = lse[static_cast<size_t>(i)];
  if (!in.backward) return;

  std::vector<double> dlse(static_cast<size_t>(span.seqlen_q), 0.0);
  for (int64_t i = 0; i < span.seqlen_q && !in.dlse.empty(); ++i)
    dlse[static_cast<size_t>(i)] = in.dlse[row_index(i)];
  const Matrix dout = rows_of(in.dout, span.row_q, span.seqlen_q, in.heads, head, in.head_dim_v);
  add_rows(product(transposed(p), dout, dtype), span.row_k, in.heads_kv, kv_head, result.dv);
  Matrix ds = product(dout, transposed(v), dtype);
  softmax_backward(p, out, dout, dlse, dtype, ds);
  ds = scaled(ds);
  add_rows(product(ds, k, dtype), span.row_q, in.heads, head, result.dq);
  add_rows(product(transposed(ds), q, dtype), span.row_k, in.heads_kv, kv_head, result.dk);
}

// Everything above, computed in `dtype`. lse has the scores of `dtype` in it; it is not rounded.
inline AttentionOutput manual_attention(const AttentionInput& in, Dtype dtype) {
  AttentionOutput result;
  const size_t rows = in.q.size() / static_cast<size_t>(in.head_dim);  // of all heads
  result.out.assign(rows * static_cast<size_t>(in.head_dim_v), 0.0);
  result.lse.assign(rows, -kInfinity);
  result.dq.assign(in.backward ? in.q.size() : 0, 0.0);
  result.dk.assign(in.backward ? in.k.size() : 0, 0.0);
  result.dv.assign(in.backward ? in.v.size() : 0, 0.0);
  for (const Span& span : in.sequences) {
    for (int head = 0; head < in.heads; ++head) attend(in, span, head, dtype, result);
  }
  for (std::vector<double>* gradient :
       {&result.dk, &result.dv}) {  // sums over the heads of a group
    for (double& x : *gradient) x = round_to(dtype, x);
  }
  return result;
}

}  // namespace flashtile::test
