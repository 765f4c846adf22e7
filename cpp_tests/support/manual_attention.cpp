#include "manual_attention.h"

#include <algorithm>
#include <cmath>

namespace flashtile::test {

namespace {

Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.cols; ++c) t(c, r) = a(r, c);
  }
  return t;
}

void round_all(Matrix& a, Dtype dtype) {
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
Matrix product(const Matrix& a, const Matrix& b, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return product_in<double>(a, b);
  Matrix c = product_in<float>(a, b);
  round_all(c, dtype);
  return c;
}

// Rows [first, first + count) of one head.
Matrix rows_of(const std::vector<double>& tensor, int64_t first, int64_t count, int heads, int head,
               int dim) {
  Matrix m(count, dim);
  for (int64_t r = 0; r < count; ++r) {
    for (int d = 0; d < dim; ++d)
      m(r, d) = tensor[static_cast<size_t>(((first + r) * heads + head) * dim + d)];
  }
  return m;
}

void add_rows(const Matrix& m, int64_t first, int heads, int head, std::vector<double>& tensor) {
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t d = 0; d < m.cols; ++d) {
      tensor[static_cast<size_t>(((first + r) * heads + head) * m.cols + d)] += m(r, d);
    }
  }
}

// Scores become probabilities in place, 0 where visible(i, j) is false; returns the log of each
// row's sum, in which sink(i) takes part. A row that sees no key gets zeros and the sink, or -inf.
template <class Visible, class Sink>
std::vector<double> softmax_rows(Matrix& s, const Visible& visible, const Sink& sink, Dtype dtype) {
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
    lse[static_cast<size_t>(i)] = sink(i);
    if (seen.empty()) continue;
    double top = sink(i);
    for (const int64_t j : seen) top = s(i, j) > top || std::isnan(s(i, j)) ? s(i, j) : top;
    double sum = sink(i) == -kInfinity ? 0.0 : std::exp(sink(i) - top);
    for (const int64_t j : seen) sum += std::exp(s(i, j) - top);
    for (const int64_t j : seen) s(i, j) = round_to(dtype, std::exp(s(i, j) - top) / sum);
    lse[static_cast<size_t>(i)] = top + std::log(sum);
  }
  return lse;
}

// dS = P * (dP - rowsum(out * dout) + dLSE), in place of dP. dlse: one number a row.
void softmax_backward(const Matrix& p, const Matrix& out, const Matrix& dout,
                      const std::vector<double>& dlse, Dtype dtype, Matrix& dp) {
  for (int64_t i = 0; i < p.rows; ++i) {
    double delta = -dlse[static_cast<size_t>(i)];
    for (int64_t d = 0; d < out.cols; ++d) delta += out(i, d) * dout(i, d);
    for (int64_t j = 0; j < p.cols; ++j) {
      dp(i, j) = p(i, j) == 0.0 ? 0.0 : round_to(dtype, p(i, j) * (dp(i, j) - delta));
    }
  }
}

void attend(const AttentionInput& in, int64_t sequence, int head, Dtype dtype,
            AttentionOutput& result) {
  const Span& span = in.sequences[static_cast<size_t>(sequence)];
  const ScorePlace at = {in, span, sequence, head, dtype};
  const bool has_scores = in.scores != nullptr;
  const int kv_head = head / (in.heads / in.heads_kv);
  const Matrix q = rows_of(in.q, span.row_q, span.seqlen_q, in.heads, head, in.head_dim);
  const Matrix k = rows_of(in.k, span.row_k, span.seqlen_k, in.heads_kv, kv_head, in.head_dim);
  const Matrix v = rows_of(in.v, span.row_k, span.seqlen_k, in.heads_kv, kv_head, in.head_dim_v);
  const auto scaled = [&](Matrix m) {
    for (int64_t i = 0; i < m.rows; ++i) {
      const double scale = in.softmax_scale * (has_scores ? at.scale_of(i) : 1.0);
      for (int64_t j = 0; j < m.cols; ++j) m(i, j) = round_to(dtype, m(i, j) * scale);
    }
    return m;
  };
  Matrix p = scaled(product(q, transposed(k), dtype)), slopes(p.rows, p.cols);
  if (has_scores) at.to_logits(p, slopes);
  const Matrix logits = p;
  const auto visible = [&](int64_t i, int64_t j) {
    return sees(in.mask, span.seqlen_q, span.seqlen_k, i, j) &&
           (!has_scores || at.shows(i, j, logits(i, j)));
  };
  const auto sink = [&](int64_t i) { return has_scores ? at.sink_of(i) : -kInfinity; };
  const std::vector<double> lse = softmax_rows(p, visible, sink, dtype);
  for (int64_t i = 0; has_scores && i < p.rows; ++i) {
    double& most = result.max_logit[static_cast<size_t>(head)];
    for (int64_t j = 0; j < p.cols; ++j) most = visible(i, j) ? std::max(most, logits(i, j)) : most;
  }
  Matrix kept = p;
  if (has_scores && in.scores->spec.dropout_p > 0) at.drop(kept);
  const Matrix out = product(kept, v, dtype);
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
  add_rows(product(transposed(kept), dout, dtype), span.row_k, in.heads_kv, kv_head, result.dv);
  Matrix ds = product(dout, transposed(v), dtype);
  if (has_scores && in.scores->spec.dropout_p > 0) at.drop(ds);
  softmax_backward(p, out, dout, dlse, dtype, ds);
  if (has_scores) {
    result.dlogits[static_cast<size_t>(sequence * in.heads + head)] = ds;
    result.probabilities[static_cast<size_t>(sequence * in.heads + head)] = p;
    for (int64_t i = 0; i < span.seqlen_q; ++i) {
      double delta = -dlse[static_cast<size_t>(i)], squares = 0;
      for (int64_t d = 0; d < out.cols; ++d) {
        delta += out(i, d) * dout(i, d);
        squares += out(i, d) * dout(i, d) * out(i, d) * dout(i, d);
      }
      result.delta_size[row_index(i)] = std::sqrt(squares);
      if (sink(i) == -kInfinity) continue;
      const double weight = std::exp(sink(i) - lse[static_cast<size_t>(i)]);
      result.sink_weight[row_index(i)] = weight;
      result.dsink[row_index(i)] = -weight * delta;
    }
    for (size_t n = 0; n < ds.data.size(); ++n)
      ds.data[n] = round_to(dtype, ds.data[n] * slopes.data[n]);
  }
  ds = scaled(ds);
  add_rows(product(ds, k, dtype), span.row_q, in.heads, head, result.dq);
  add_rows(product(transposed(ds), q, dtype), span.row_k, in.heads_kv, kv_head, result.dk);
}

}  // namespace

void ScorePlace::to_logits(Matrix& s, Matrix& slopes) const {
  const double cap = scores().spec.softcap;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.cols; ++j) {
      double& x = s(i, j);
      slopes(i, j) = 1.0;
      if (cap != 0) {
        const double capped = round_to(dtype, std::tanh(round_to(dtype, x / cap)));
        slopes(i, j) = 1.0 - capped * capped;
        x = round_to(dtype, cap * capped);
      }
      for (int n = 0; n < 2; ++n)
        x = round_to(dtype, x + scores().added(n, sequence, head, i, span.first_key + j));
      const double slope = scores().slope(sequence, head);
      if (slope != 0) x = round_to(dtype, x - slope * distance(i, j));
    }
  }
}

void ScorePlace::drop(Matrix& p) const {
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.cols; ++j) {
      const bool kept = scores().keeps(sequence, head, i, j);
      p(i, j) = kept ? round_to(dtype, p(i, j) * scores().drop_scale()) : 0.0;
    }
  }
}

AttentionOutput manual_attention(const AttentionInput& in, Dtype dtype) {
  AttentionOutput result;
  const size_t rows = in.q.size() / static_cast<size_t>(in.head_dim);  // of all heads
  result.out.assign(rows * static_cast<size_t>(in.head_dim_v), 0.0);
  result.lse.assign(rows, -kInfinity);
  result.dq.assign(in.backward ? in.q.size() : 0, 0.0);
  result.dk.assign(in.backward ? in.k.size() : 0, 0.0);
  result.dv.assign(in.backward ? in.v.size() : 0, 0.0);
  if (in.scores != nullptr) {
    result.dlogits.resize(in.sequences.size() * static_cast<size_t>(in.heads));
    result.probabilities.resize(result.dlogits.size());
    for (std::vector<double>* of : {&result.dsink, &result.delta_size, &result.sink_weight})
      of->assign(in.backward ? rows : 0, 0.0);
    result.max_logit.assign(static_cast<size_t>(in.heads), -kInfinity);
  }
  for (size_t sequence = 0; sequence < in.sequences.size(); ++sequence) {
    for (int head = 0; head < in.heads; ++head)
      attend(in, static_cast<int64_t>(sequence), head, dtype, result);
  }
  for (std::vector<double>* gradient :
       {&result.dk, &result.dv}) {  // sums over the heads of a group
    for (double& x : *gradient) x = round_to(dtype, x);
  }
  return result;
}

}  // namespace flashtile::test
