#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>

#include "numbers_of_problem.h"

namespace flashtile::test {

namespace {

void compare_block(const RowTensor& t, int64_t first, int64_t count, Comparison& worst) {
  double error = 0.0, rounding = 0.0, largest = 0.0;
  const int64_t row_size = int64_t{t.heads} * t.dim;
  for (int64_t i = first * row_size; i < (first + count) * row_size; ++i) {
    const auto at = static_cast<size_t>(i);
    if (!same_kind(t.result[at], t.truth[at])) {
      worst.ratio = worst.error = kInfinity;
      worst.where = std::string(t.name) + "[row " + std::to_string(i / row_size) + ", head " +
                    std::to_string(i % row_size / t.dim) + ", " + std::to_string(i % t.dim) +
                    "] is " + std::to_string(t.result[at]) + ", not " + std::to_string(t.truth[at]);
      return;
    }
    if (!std::isfinite(t.truth[at])) continue;
    error = std::max(error, std::fabs(t.result[at] - t.truth[at]));
    const double one = std::fabs(t.rounded[at] - t.truth[at]);
    if (std::isfinite(one)) rounding = std::max(rounding, one);
    largest = std::max(largest, std::fabs(t.truth[at]));
  }
  worst.add_block({t.name, first, error, rounding, t.epsilon / 2 * largest + t.noise});
}

// Which rows take part: a query that sees a key, a key that a query sees.
std::vector<bool> rows_that_take_part(const AttentionInput& in, size_t rows, bool keys) {
  std::vector<bool> part(rows, false);
  for (const Span& span : in.sequences) {
    for (int64_t i = 0; i < span.seqlen_q; ++i) {
      for (int64_t j = 0; j < span.seqlen_k; ++j) {
        if (!sees(in.mask, span.seqlen_q, span.seqlen_k, i, j)) continue;
        part[static_cast<size_t>(keys ? span.row_k + j : span.row_q + i)] = true;
      }
    }
  }
  return part;
}

void compare_zeros(const RowTensor& t, const std::vector<bool>& part, Comparison& worst) {
  const auto row_size = static_cast<size_t>(int64_t{t.heads} * t.dim);
  for (size_t i = 0; i < t.result.size(); ++i) {
    if (part[i / row_size] || t.result[i] == 0.0) continue;
    worst.ratio = worst.error = kInfinity;
    worst.where = std::string(t.name) + "[row " + std::to_string(i / row_size) +
                  ", which takes no part] has " + std::to_string(t.result[i]) + ", not 0";
    return;
  }
}

}  // namespace

std::string BlockError::text() const {
  char text[120];
  std::snprintf(text, sizeof text, "%s rows %lld..: error %.3g, in the dtype %.3g, floor %.3g",
                tensor, static_cast<long long>(row), error, rounding, floor);
  return text;
}

void Comparison::add(const Comparison& other) {
  blocks.insert(blocks.end(), other.blocks.begin(), other.blocks.end());
  error = std::max(error, other.error);
  if (other.ratio <= ratio) return;
  ratio = other.ratio;
  where = other.where;
}

void Comparison::add_block(const BlockError& block) {
  blocks.push_back(block);
  error = std::max(error, block.error);
  raise(block);
}

void Comparison::pool(const Comparison& other) {
  error = std::max(error, other.error);
  ratio = 0.0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].error = std::max(blocks[i].error, other.blocks[i].error);
    blocks[i].rounding = std::max(blocks[i].rounding, other.blocks[i].rounding);
    blocks[i].floor = std::max(blocks[i].floor, other.blocks[i].floor);
    raise(blocks[i]);
  }
}

void Comparison::raise(const BlockError& block) {
  if (block.ratio() <= ratio) return;
  ratio = block.ratio();
  where = block.text();
}

bool same_kind(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return true;
}

Comparison compare_rows(const RowTensor& t, const AttentionInput& in) {
  Comparison worst;
  if (t.result.size() != t.truth.size()) {
    worst.ratio = worst.error = kInfinity;
    worst.where = std::string(t.name) + " has " + std::to_string(t.result.size()) +
                  " elements, not " + std::to_string(t.truth.size());
    return worst;
  }
  const size_t rows = t.result.size() / static_cast<size_t>(int64_t{t.heads} * t.dim);
  compare_zeros(t, rows_that_take_part(in, rows, t.keys), worst);
  for (const Span& span : in.sequences) {
    const int64_t begin = t.keys ? span.row_k : span.row_q,
                  rows = t.keys ? span.seqlen_k : span.seqlen_q;
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      const int64_t first = std::min(r, std::max<int64_t>(0, rows - kBlockRows));
      compare_block(t, begin + first, std::min(kBlockRows, rows), worst);
    }
  }
  return worst;
}

Comparison compare_lse(Dtype dtype, const std::vector<double>& result,
                       const std::vector<double>& truth) {
  const bool wide = lse_dtype_of(dtype) == Dtype::kFloat64;
  const double fixed = wide ? 1e-13 : 1e-5, relative = wide ? 1e-13 : 2e-6;
  Comparison worst;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::fabs(result[i] - truth[i]);
    const bool same = same_kind(result[i], truth[i]);
    const double allowed = fixed + relative * std::fabs(truth[i]);
    const double ratio = !same ? kInfinity : std::isfinite(truth[i]) ? error / allowed : 0.0;
    if (ratio <= worst.ratio) continue;
    worst.ratio = ratio;
    worst.error = error;
    worst.where = "lse[" + std::to_string(i) + "] is " + std::to_string(result[i]) + ", not " +
                  std::to_string(truth[i]);
  }
  return worst;
}

Truth::Truth(const Setup& setup) : Truth(setup, manual_input(setup)) {}

Truth::Truth(const Setup& setup, const AttentionInput& input)
    : Truth(setup, input, manual_attention(input, Dtype::kFloat64),
            manual_attention(input, setup.dtype)) {}

Truth::Truth(const Setup& setup, const AttentionInput& input, const AttentionOutput& exact,
             const AttentionOutput& rounded)
    : input(input), exact(exact), rounded(rounded) {
  const auto largest = [](const std::vector<double>& values) {
    double top = 0.0;
    for (const double x : values) top = std::max(top, std::isfinite(x) ? std::fabs(x) : 0.0);
    return top;
  };
  const double relative = setup.dtype == Dtype::kFloat64 ? 1e-13 : 1e-5;
  const double unit = lse_dtype_of(setup.dtype) == Dtype::kFloat64 ? 0x1p-52 : 0x1p-23;
  const double from_lse = unit * largest(exact.lse);  // relative error of every probability
  const double dp = std::sqrt(static_cast<double>(setup.head_dim_v)) * largest(input.v);
  const double ds =
      dp * std::fabs(input.softmax_scale) * std::max(largest(input.k), largest(input.q));
  out_noise = relative * std::max(1.0, largest(input.v));
  dqk_noise = (relative + from_lse) * std::max(1.0, ds);
  dv_noise = (relative + from_lse) * std::max(1.0, largest(exact.dv));
}

std::string Verdict::text() const {
  std::string all;
  if (!forward.passed()) all += "\n    " + forward.where;
  if (lse.ratio > 1.0) all += "\n    " + lse.where;
  if (max_logit.ratio > 1.0) all += "\n    max_logit: " + max_logit.where;
  if (!backward.passed()) all += "\n    " + backward.where;
  if (!scores.passed()) all += "\n    " + scores.where;
  return all;
}

Verdict compare(const Setup& setup, const Truth& truth, const AttentionOutput& result) {
  const double epsilon = epsilon_of(setup.dtype);
  const int heads = truth.input.heads, heads_kv = truth.input.heads_kv;
  const int dim = setup.head_dim, dim_v = setup.head_dim_v;
  const auto& [exact, rounded] = std::tie(truth.exact, truth.rounded);
  Verdict verdict;
  verdict.forward = compare_rows(
      {"out", result.out, exact.out, rounded.out, heads, dim_v, false, epsilon, truth.out_noise},
      truth.input);
  verdict.lse = compare_lse(setup.dtype, result.lse, exact.lse);
  if (setup.forward_only()) return verdict;
  const RowTensor gradients[] = {
      {"dq", result.dq, exact.dq, rounded.dq, heads, dim, false, epsilon, truth.dqk_noise},
      {"dk", result.dk, exact.dk, rounded.dk, heads_kv, dim, true, epsilon, truth.dqk_noise},
      {"dv", result.dv, exact.dv, rounded.dv, heads_kv, dim_v, true, epsilon, truth.dv_noise},
  };
  for (const RowTensor& gradient : gradients)
    verdict.backward.add(compare_rows(gradient, truth.input));
  return verdict;
}

}  // namespace flashtile::test
