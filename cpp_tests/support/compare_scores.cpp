#include "compare_scores.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace flashtile::test {

namespace {

// A sum, the sum of the absolute values of its terms, and the squares of what rounding out may do
// to it, in units of the dtype.
struct SumOfTerms {
  double value = 0, size = 0, rounding_squared = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

// The gradient of a tensor at an element: of logits, times factor(b, h, i, j), over all that the
// tensor repeats.
template <class Factor>
SumOfTerms gradient_at(const AttentionInput& in, const AttentionOutput& of, const Dims& dims,
                       const int64_t (&at)[4], const Factor& factor) {
  SumOfTerms sum;
  for (int64_t b = 0; b < static_cast<int64_t>(in.sequences.size()); ++b) {
    for (int64_t h = 0; h < in.heads; ++h) {
      if ((dims.batch && b != at[0]) || (dims.head && h != at[1])) continue;
      const Matrix& d = of.dlogits[static_cast<size_t>(b * in.heads + h)];
      const Matrix& p = of.probabilities[static_cast<size_t>(b * in.heads + h)];
      const int64_t first_row = in.sequences[static_cast<size_t>(b)].row_q;
      for (int64_t i = dims.query ? at[2] : 0; i < (dims.query ? at[2] + 1 : d.rows); ++i) {
        double weight = 0;
        for (int64_t j = dims.key ? at[3] : 0; j < (dims.key ? at[3] + 1 : d.cols); ++j) {
          if (i >= d.rows || j >= d.cols) continue;
          sum.add(d(i, j) * factor(b, h, i, j));
          weight += p(i, j) * factor(b, h, i, j);
        }
        if (i >= d.rows) continue;
        const double miss =
            weight * of.delta_size[static_cast<size_t>((first_row + i) * in.heads + h)];
        sum.rounding_squared += miss * miss;
        sum.size += std::fabs(miss);
      }
    }
  }
  return sum;
}

// The sinks' gradients, which are numbers of rows.
SumOfTerms sink_gradient_at(const AttentionInput& in, const AttentionOutput& of, const Dims& dims,
                            const int64_t (&at)[4]) {
  SumOfTerms sum;
  for (int64_t b = 0; b < static_cast<int64_t>(in.sequences.size()); ++b) {
    const Span& span = in.sequences[static_cast<size_t>(b)];
    for (int64_t h = 0; h < in.heads; ++h) {
      if ((dims.batch && b != at[0]) || (dims.head && h != at[1])) continue;
      for (int64_t i = 0; i < span.seqlen_q; ++i) {
        const int64_t row = span.row_q + i, first = in.packed ? 0 : b * in.rows_per_batch;
        if (dims.query && row - first != at[2]) continue;
        const auto index = static_cast<size_t>(row * in.heads + h);
        sum.add(of.dsink[index]);
        const double miss = of.sink_weight[index] * of.delta_size[index];
        sum.rounding_squared += miss * miss;
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
  double error = 0, rounding = 0, largest = 0, size = 0, miss = 0;
  result.host.for_each([&](int64_t b, int64_t i, int64_t h, int64_t j) {
    const int64_t at[4] = {b, h, i, j};
    const SumOfTerms truth = exact(at);
    const double value = result.host.get(b, i, h, j);
    if (!same_kind(value, truth.value)) {
      worst.ratio = worst.error = kInfinity;
      worst.where = std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(h) + ", " +
                    std::to_string(i) + ", " + std::to_string(j) + "] is " + std::to_string(value) +
                    ", not " + std::to_string(truth.value);
      return;
    }
    error = std::max(error, std::fabs(value - truth.value));
    rounding =
        std::max(rounding, std::fabs(round_to(result.dtype, rounded(at).value) - truth.value));
    largest = std::max(largest, std::fabs(truth.value));
    size = std::max(size, truth.size);
    miss = std::max(miss, std::sqrt(truth.rounding_squared));
  });
  if (!worst.passed()) return worst;
  const double relative = setup.dtype == Dtype::kFloat64 ? 1e-13 : 1e-5;
  worst.add_block(
      {name, 0, error, rounding,
       epsilon_of(result.dtype) / 2 * largest + relative * size + epsilon_of(setup.dtype) * miss});
  return worst;
}

Comparison compare_scores(const Setup& setup, const Truth& truth, const ScoreResults& results) {
  const AttentionInput& in = truth.input;
  Comparison all;
  const auto compare = [&](const char* name, const ScoreTensor& result, const auto& factor) {
    const auto side = [&](const AttentionOutput& of) {
      return [&](const int64_t (&at)[4]) { return gradient_at(in, of, result.dims, at, factor); };
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
    return [&](const int64_t (&at)[4]) { return sink_gradient_at(in, of, results.dsink.dims, at); };
  };
  all.add(compare_gradient("dsink", setup, results.dsink, sink_side(truth.exact),
                           sink_side(truth.rounded)));
  return all;
}

// Logits are fp32 sums (fp64 of fp64 problems), as the LSE is.
Comparison compare_max_logit(const Setup& setup, const Truth& truth, const ScoreResults& results) {
  if (results.max_logit.empty()) return {};
  return compare_lse(setup.dtype, results.max_logit, truth.exact.max_logit);
}

}  // namespace

Verdict compare(const Setup& setup, const Truth& truth, const RunResult& result) {
  Verdict verdict = compare(setup, truth, result.values);
  if (!setup.spec.scores.exist()) return verdict;
  verdict.max_logit = compare_max_logit(setup, truth, result.scores);
  if (!setup.forward_only()) verdict.scores = compare_scores(setup, truth, result.scores);
  return verdict;
}

}  // namespace flashtile::test
