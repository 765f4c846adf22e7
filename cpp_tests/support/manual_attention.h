// Manual attention in plain loops: softmax(scale * Q K^T + mask) V and its gradients, one sequence
// and head at a time, the score matrix written out. It shares no code with the library.
//
// One function computes both sides of the error bound. In fp64 it is the truth. In another dtype it
// rounds where plain torch does: after each product (accumulated in fp32), after scaling, after
// softmax. The backward starts from the rounded out, which is all that a backward is given. GQA
// repeats the kv heads and sums their gradients before rounding them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "mask.h"
#include "numbers.h"
#include "scores.h"

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
  int64_t first_key = 0;  // where biases and masks have the first key: behind the left padding
};

// Dense copies of the tensors: index (row * heads + head) * dim + d, where dim is head_dim for q
// and k, head_dim_v for v and dout; rows of all sequences.
struct AttentionInput {
  std::vector<Span> sequences;
  int heads = 1, heads_kv = 1, head_dim = 1, head_dim_v = 1;
  double softmax_scale = 1.0;
  Mask mask;
  bool packed = false;         // varlen
  int64_t rows_per_batch = 0;  // of q, dense
  std::vector<double> q, k, v;
  bool backward = true;
  std::vector<double> dout;
  std::vector<double> dlse;  // index row * heads + head; empty: zero
  const ScoreInput* scores = nullptr;
};

struct AttentionOutput {
  std::vector<double> out, lse, dq, dk, dv;  // lse: index row * heads + head
  // With scores: gradients of the logits of every sequence and head, index sequence * heads + head,
  // of the sinks, as lse, and the largest logit of every head.
  std::vector<Matrix> dlogits, probabilities;
  std::vector<double> dsink, max_logit;
  // Of every row, as lse: the square root of sum (out dout)^2, what rounding out makes delta miss
  // by per unit of it; and the weight of the sink.
  std::vector<double> delta_size, sink_weight;
};

// One sequence and head on its way from scores to logits and back.
struct ScorePlace {
  const AttentionInput& in;
  const Span& span;
  int64_t sequence;
  int head;
  Dtype dtype;

  const ScoreInput& scores() const { return *in.scores; }
  // By row of q: in varlen, which counts rows over all sequences, there is one batch.
  int64_t row(int64_t i) const { return in.packed ? span.row_q + i : i; }
  int64_t row_batch() const { return in.packed ? 0 : sequence; }
  double scale_of(int64_t i) const { return scores().scale_of(row_batch(), row(i)); }
  double sink_of(int64_t i) const {
    return scores().sink_of(scores().sink.dims.query ? row_batch() : sequence, head, row(i));
  }
  double distance(int64_t i, int64_t j) const {
    const int64_t shift = in.mask.top_left ? 0 : span.seqlen_k - span.seqlen_q;
    return static_cast<double>(std::abs(i + shift - j));
  }
  bool shows(int64_t i, int64_t j, double logit) const {
    return scores().shows(sequence, head, i, span.first_key + j) &&
           !(logit == -kInfinity && scores().spec.hides_keys());
  }
  // Scaled scores become logits; `slopes`: their derivatives.
  void to_logits(Matrix& s, Matrix& slopes) const;
  void drop(Matrix& p) const;
};

// Everything above, computed in `dtype`. lse has the scores of `dtype` in it; it is not rounded.
AttentionOutput manual_attention(const AttentionInput& in, Dtype dtype);

}  // namespace flashtile::test
