// The table of cases itself: every case can be set up under each of its masks, holds NaN wherever
// nobody may read, and manual attention of it is finite where rows take part and 0 elsewhere.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../support/cases.h"
#include "../support/check.h"
#include "../support/compare.h"
#include "../support/score_matrix.h"
#include "../support/setup.h"

using namespace flashtile::test;

namespace {

// Small, so that all pairs of the table run in a second.
const HeadDims kSmallDims = {8, 6};

std::vector<Case> every_case() {
  return joined({shape_cases(), option_cases(), varlen_cases(), window_cases(), used_cases(),
                 few_query_cases(), head_dim_cases(), long_cases()});
}

// Calls visit(values of the row) for the rows that are in use, or for the others.
template <class Visit>
void for_rows(const std::vector<double>& dense, const std::vector<bool>& in_use, bool wanted,
              const Visit& visit) {
  const size_t row_size = in_use.empty() ? 0 : dense.size() / in_use.size();
  for (size_t row = 0; row < in_use.size(); ++row) {
    const auto begin = dense.begin() + static_cast<std::ptrdiff_t>(row * row_size);
    if (in_use[row] == wanted)
      visit(std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(row_size)));
  }
}

bool all_nan(const std::vector<double>& row) {
  return std::all_of(row.begin(), row.end(), [](double x) { return std::isnan(x); });
}
bool all_finite(const std::vector<double>& row) {
  return std::all_of(row.begin(), row.end(), [](double x) { return std::isfinite(x); });
}

void check_inputs(const Setup& setup) {
  const std::vector<bool> queries = rows_in_use(setup, false), keys = rows_in_use(setup, true);
  const std::pair<const HostTensor*, const std::vector<bool>*> tensors[] = {
      {&setup.q, &queries},
      {&setup.k, &keys},
      {&setup.v, &keys},
      {&setup.dout, &queries},
      {&setup.dlse, &queries}};
  for (const auto& [tensor, in_use] : tensors) {
    const std::vector<double> dense = tensor->dense();
    for_rows(dense, *in_use, false,
             [&](const auto& row) { CHECK_MESSAGE(all_nan(row), setup.name()); });
    if (setup.spec.values == Values::kNan) continue;
    for_rows(dense, *in_use, true,
             [&](const auto& row) { CHECK_MESSAGE(all_finite(row), setup.name()); });
  }
}

void check_truth(const Setup& setup) {
  const AttentionInput input = manual_input(setup);
  const AttentionOutput truth = manual_attention(input, Dtype::kFloat64);
  CHECK_EQ(truth.lse.size() * static_cast<size_t>(setup.head_dim_v), truth.out.size());
  for (const auto* values : {&truth.out, &truth.dq, &truth.dk, &truth.dv}) {
    const bool finite = setup.spec.values == Values::kNan || all_finite(*values);
    CHECK_MESSAGE(finite, setup.name() + ": the truth has a NaN or an infinity");
  }
  for_rows(truth.lse, rows_in_use(setup, false), false, [&](const auto& row) {
    for (const double lse : row) CHECK_MESSAGE(lse == -kInfinity, setup.name());
  });
}

}  // namespace

TEST("every case holds NaN where nobody reads, and its truth does not see it") {
  for (const Case& spec : every_case()) {
    for (const Mask& mask : spec.masks) {
      const Setup setup = make_setup(spec, Dtype::kFloat32, kSmallDims, mask);
      check_inputs(setup);
      check_truth(setup);
    }
  }
}

TEST("every case fits its own lengths") {
  for (const Case& spec : every_case()) {
    const size_t batch = spec.is_varlen() ? spec.lengths_q.size() : static_cast<size_t>(spec.batch);
    CHECK_EQ(spec.lengths_k.size(), spec.lengths_q.size());
    CHECK_MESSAGE(!spec.masks.empty(), spec.name);
    CHECK_MESSAGE(spec.is_varlen() || spec.tail_q + spec.tail_k == 0, spec.name);
    // With broadcast tensors there is no row of its own to be poisoned.
    const bool all_rows = spec.used_q.empty() && spec.used_k.empty();
    CHECK_MESSAGE(all_rows || spec.layout != Layout::kBroadcast, spec.name);
    const auto fits = [&](const std::vector<int>& used, const std::vector<int>& lengths, int len) {
      if (used.empty()) return true;
      for (size_t b = 0; b < used.size(); ++b) {
        const int length = spec.is_varlen() ? lengths[b] : len;
        if (used[b] < 0 || used[b] > length) return false;
      }
      return used.size() == batch;
    };
    CHECK_MESSAGE(fits(spec.used_q, spec.lengths_q, spec.seqlen_q), spec.name);
    CHECK_MESSAGE(fits(spec.used_k, spec.lengths_k, spec.seqlen_k), spec.name);
  }
}

TEST("every pair of head dims can be set up") {
  for (const auto& head_dims : {equal_head_dims(), unequal_head_dims()}) {
    for (const HeadDims& dims : head_dims) {
      const Setup setup = make_setup(head_dim_cases().front(), Dtype::kBFloat16, dims, kCausal);
      check_inputs(setup);
      check_truth(setup);
      CHECK_EQ(setup.v.extents().dim, int64_t{dims.v});
      CHECK_EQ(setup.dout.extents().dim, int64_t{dims.v});
      CHECK_EQ(setup.k.extents().dim, int64_t{dims.qk});
    }
  }
}

// A sequence of which some rows are in use is the shorter sequence.
TEST("rows in use are a sequence of their own") {
  const Case longer = {.name = "",
                       .heads = 2,
                       .heads_kv = 1,
                       .seqlen_q = 9,
                       .seqlen_k = 12,
                       .used_q = {5},
                       .used_k = {7}};
  const Case shorter = {.name = "", .heads = 2, .heads_kv = 1, .seqlen_q = 5, .seqlen_k = 7};
  for (const Mask& mask : {kFull, kCausal, kCausalTopLeft, Mask{2, 1}}) {
    const AttentionInput all = manual_input(make_setup(longer, Dtype::kFloat64, {4, 3}, mask));
    AttentionInput part = manual_input(make_setup(shorter, Dtype::kFloat64, {4, 3}, mask));
    for (auto tensor : {&AttentionInput::q, &AttentionInput::k, &AttentionInput::v,
                        &AttentionInput::dout, &AttentionInput::dlse})
      std::copy_n((all.*tensor).begin(), (part.*tensor).size(), (part.*tensor).begin());
    const AttentionOutput a = manual_attention(all, Dtype::kFloat64);
    const AttentionOutput b = manual_attention(part, Dtype::kFloat64);
    for (auto tensor : {&AttentionOutput::out, &AttentionOutput::lse, &AttentionOutput::dq,
                        &AttentionOutput::dk, &AttentionOutput::dv})
      CHECK_MESSAGE(std::equal((b.*tensor).begin(), (b.*tensor).end(), (a.*tensor).begin()),
                    name_of(mask));
  }
}

// How many allowed combinations of the levels of `count` factors no row has.
size_t missing(const std::vector<int>& levels, const std::vector<Choice>& rows, int count,
               const Allowed& allowed) {
  const auto has = [&](const Choice& wanted) {
    return std::any_of(rows.begin(), rows.end(), [&](const Choice& row) {
      for (size_t f = 0; f < wanted.size(); ++f) {
        if (wanted[f] >= 0 && row[f] != wanted[f]) return false;
      }
      return true;
    });
  };
  size_t found = 0;
  Choice wanted(levels.size(), -1);
  const auto count_missing = [&](auto&& self, size_t first, int left) -> void {
    if (left == 0) {
      found += allowed(wanted) && !has(wanted);
      return;
    }
    for (size_t f = first; f < levels.size(); ++f) {
      for (int level = 0; level < levels[f]; ++level) {
        wanted[f] = level;
        self(self, f + 1, left - 1);
      }
      wanted[f] = -1;
    }
  };
  count_missing(count_missing, 0, count);
  return found;
}

TEST("the matrix covers every pair and every three of its factors") {
  const std::vector<int> levels = matrix_levels();
  CoveringArray array(levels, matrix_allows);
  array.extend(2);
  const std::vector<Choice> pairs = array.rows();
  array.extend(3);
  CHECK_EQ(array.rows().size(), matrix().size());
  CHECK_EQ(missing(levels, pairs, 2, matrix_allows), size_t{0});
  CHECK_EQ(missing(levels, array.rows(), 3, matrix_allows), size_t{0});
}

TEST("the axis of scores meets every three of the others, and every two options meet") {
  const Allowed all = [](const Choice&) { return true; };
  std::vector<int> levels = score_matrix_levels();
  const std::vector<Choice> rows = rows_for_options(), of_options = rows_of_options();
  CHECK_EQ(missing(levels, rows, 3, all), size_t{0});
  levels.push_back(static_cast<int>(matrix_scores().size()));
  CHECK_EQ(missing(levels, of_options, 2, all), size_t{0});
  const size_t options = matrix_scores().size();
  CHECK_EQ(score_matrix().size(), of_options.size() + rows.size() * options + rows.size());
  CHECK(rows.size() >= matrix_score_pairs().size());
  CHECK(matrix().size() <= static_cast<size_t>(kFirstScoreCell));
  for (size_t i = 0; i < options; ++i) {
    size_t cells = 0;
    for (const Cell& cell : score_matrix())
      cells += cell.spec.name.ends_with(", " + matrix_scores()[i].name);
    CHECK_MESSAGE(cells > rows.size(), matrix_scores()[i].name);
  }
}
