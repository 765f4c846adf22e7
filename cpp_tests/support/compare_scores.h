// The error bound of compare.h for what calls write of scores: gradients of biases, slopes and sinks,
// each as a whole, and the largest logits.
//
// The floor: half a unit of the largest value, and the noise of sums in fp32 (fp64 of fp64 problems),
// 1e-5 (1e-13) times the largest sum of the absolute values of what is added up.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "compare.h"
#include "runner.h"

namespace flashtile::test {

// A sum, and the sum of the absolute values of its terms.
struct SumOfTerms {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

// The gradient of a tensor at an element: of logits, times factor(b, h, i, j), over all that the
// tensor repeats.
template <class Factor>
SumOfTerms gradient_at(const AttentionInput& in, const std::vector<Matrix>& dlogits,
                       const Dims& dims, const int64_t (&at)[4], const Factor& factor) {
  SumOfTerms sum;
  for (int64_t b = 0; b < static_cast<int64_t>(in.sequences.size()); ++b) {
    for (int64_t h = 0; h < in.heads; ++h) {
      if ((dims.batch && b != at[0]) || (dims.head && h != at[1])) continue;
      const Matrix& d = dlogits[static_cast<size_t>(b * in.heads + h)];
      for (int64_t i = dims.query ? at[2] : 0; i < (dims.query ? at[2] + 1 : d.rows); ++i) {
        for (int64_t j = dims.key ? at[3] : 0; j < (dims.key ? at[3] + 1 : d.cols); ++j) {
          if (i < d.rows && j < d.cols) sum.add(d(i, j) * factor(b, h, i, j));
        }
      }
    }
  }
  return sum;
}

// The sinks' gradients, which are numbers of rows: `dsink` as lse.
inline SumOfTerms sink_gradient_at(const AttentionInput& in, const std::vector<double>& dsink,
                                   const Dims& dims, const int64_t (&at)[4]) {
  SumOfTerms sum;
  for (int64_t b = 0; b < static_cast<int64_t>(in.sequences.size()); ++b) {
    const Span& span = in.sequences[static_cast<size_t>(b)];
    for (int64_t h = 0; h < in.heads; ++h) {
      for (int64_t i = 0; i < span.seqlen_q; ++i) {
        const int64_t row = span.row_q + i, first = in.packed ? 0 : b * in.rows_per_batch;
        const bool same_batch = dims.query ? in.packed || b == at[0] : b == at[0];
        if ((dims.batch && !same_batch) || (dims.head && h != at[1])) continue;
        if (dims.query && row - first != at[2]) continue;
        sum.add(dsink[static_cast<size_t>(row * in.heads + h)]);
      }
    }
  }
  return sum;
}

// Compares all elements of `result`; exact(at) and rounded(at) are both sides of the bound.
template <class Exact, class Rounded>
Comparison compare_gradient(const char* name, const Setup& setup, const ScoreTensor& result,
                            const Exact& exact, const Rounded& rounded) {
  Comparison worst;
  if (!result.exists()) return worst;
  double error = 0, rounding = 0, largest = 0, size = 0;
  result.host.for_each([&](int64_t b, int64_t i, int64_t h, int64_t j) {
    const int64_t at[4] = {b, h, i, j};
    const SumOfTerms truth = exact(at);
    const double value = result.host.get(b, i, h, j);
    if (!same_kind(value, truth.value)) {
      worst.ratio = worst.error = kInfinity;
      worst.where = std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(h) + ", " +
                    std::to_string(i) + ", " + std::to_string(j) + "] is " +
                    std::to_string(value) + ", not " + std::to_string(truth.value);
      return;
    }
    error = std::max(error, std::fabs(value - truth.value));
    rounding = std::max(rounding, std::fabs(round_to(result.dtype, rounded(at).value) - truth.value));
    largest = std::max(largest, std::fabs(truth.value));
    size = std::max(size, truth.size);
  });
  if (!worst.passed()) return worst;
  const double relative = setup.dtype == Dtype::kFloat64 ? 1e-13 : 1e-5;
  worst.add_block(
      {name, 0, error, rounding, epsilon_of(result.dtype) / 2 * largest + relative * size});
  return worst;
}

inline Comparison compare_scores(const Setup& setup, const Truth& truth,
                                 const ScoreResults& results) {
  const AttentionInput& in = truth.input;
  Comparison all;
  const auto compare = [&](const char* name, const ScoreTensor& result, const auto& factor) {
    const auto side = [&](const AttentionOutput& of) {
      return [&](const int64_t (&at)[4]) {
        return gradient_at(in, of.dlogits, result.dims, at, factor);
      };
    };
    all.add(compare_gradient(name, setup, result, side(truth.exact), side(truth.rounded)));
  };
  const auto one = [](int64_t, int64_t, int64_t, int64_t) { return 1.0; };
  compare("dbias[0]", results.dbias[0], one);
  compare("dbias[1]", results.dbias[1], one);
  compare("dalibi_slopes", results.dalibi, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    const ScorePlace at = {in, in.sequences[static_cast<size_t>(b)], b, static_cast<int>(h),
                           setup.dtype};
    return -at.distance(i, j);
  });
  const auto sink_side = [&](const AttentionOutput& of) {
    return [&](const int64_t (&at)[4]) {
      return sink_gradient_at(in, of.dsink, results.dsink.dims, at);
    };
  };
  all.add(compare_gradient("dsink", setup, results.dsink, sink_side(truth.exact),
                           sink_side(truth.rounded)));
  return all;
}

// Logits are fp32 sums (fp64 of fp64 problems), as the LSE is.
inline Comparison compare_max_logit(const Setup& setup, const Truth& truth,
                                    const ScoreResults& results) {
  if (results.max_logit.empty()) return {};
  return compare_lse(setup.dtype, results.max_logit, truth.exact.max_logit);
}

}  // namespace flashtile::test
