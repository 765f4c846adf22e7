#include "score_matrix.h"

#include <array>
#include <cstdio>

namespace flashtile::test {

namespace {

constexpr std::array<Heads, 2> kScoreMatrixHeads = {{{4, 2}, {3, 1}}};
constexpr std::array<Layout, 4> kScoreMatrixLayouts = {Layout::kDense, Layout::kPadded,
                                                       Layout::kOdd, Layout::kMixed};

// Those of the slice of 64: whole, narrower, and rows that no 16 bytes divide.
const std::vector<HeadDims>& score_matrix_head_dims() {
  static const std::vector<HeadDims> all = {64, {40, 64}, {33, 24}};
  return all;
}

const std::vector<Mask>& score_matrix_masks() {
  static const std::vector<Mask> all = {kFull, kCausal, kCausalTopLeft, {20, 10}, {16, 40, true}};
  return all;
}

// Few queries over many keys and over a cache are decoded; of a cache there is no backward.
const std::vector<Case>& score_matrix_sequences() {
  static const std::vector<Case> all = {
      {.name = "square", .seqlen_q = 66, .seqlen_k = 66},
      {.name = "more queries", .batch = 2, .seqlen_q = 37, .seqlen_k = 20},
      {.name = "few queries", .seqlen_q = 2, .seqlen_k = 530},
      {.name = "varlen with tails",
       .lengths_q = {33, 0, 18},
       .lengths_k = {40, 9, 0},
       .tail_q = 5,
       .tail_k = 3},
      {.name = "in use",
       .batch = 2,
       .seqlen_q = 30,
       .seqlen_k = 45,
       .used_q = {30, 17},
       .used_k = {45, 11}},
      {.name = "varlen in use",
       .lengths_q = {40, 17, 5},
       .lengths_k = {34, 33, 40},
       .used_q = {30, 17, 5},
       .used_k = {34, 0, 9}},
      {.name = "over a cache",
       .batch = 2,
       .seqlen_q = 35,
       .seqlen_k = 70,
       .used_k = {70, 41},
       .keys_in_cache = true},
      {.name = "few queries over a cache",
       .batch = 2,
       .seqlen_q = 3,
       .seqlen_k = 130,
       .used_k = {130, 75},
       .keys_in_cache = true}};
  return all;
}

Cell score_cell_of(const Choice& row, const NamedScores& scores, int index, bool in_pairs) {
  const auto level = [&](Factor factor) { return static_cast<size_t>(row[factor]); };
  Cell cell = {.index = index,
               .in_pairs = in_pairs,
               .spec = score_matrix_sequences()[level(kFactorSequences)],
               .dtype = static_cast<Dtype>(row[kFactorDtype]),
               .head_dims = score_matrix_head_dims()[level(kFactorHeadDims)],
               .mask = score_matrix_masks()[level(kFactorMask)]};
  set_options(row, kScoreMatrixHeads[level(kFactorHeads)],
              kScoreMatrixLayouts[level(kFactorLayout)], cell);
  cell.spec.scores = scores.spec;
  cell.spec.name += ", " + scores.name;
  return cell;
}

}  // namespace

const std::vector<NamedScores>& matrix_scores() {
  static const std::vector<NamedScores> all = [] {
    const Dims by_head = {false, true, true, true}, keys = {true, false, false, true},
               queries = {true, true, true, false}, one = {false, false, false, false};
    BiasSpec odd = bias_of({});  // at odd addresses, with -inf and rows of it
    odd.odd = true;
    odd.hidden = 0.2;
    odd.hides_rows = true;
    return std::vector<NamedScores>{
        {"softcap", ScoreSpec{.softcap = 2}},
        {"alibi of heads", ScoreSpec{.alibi = 1}},
        {"alibi of sequences", ScoreSpec{.alibi = 2}},
        {"bias", with_bias(bias_of({}))},
        {"bias of heads, bf16", with_bias(bias_of(by_head, Dtype::kBFloat16))},
        {"bias of keys, fp16", with_bias(bias_of(keys, Dtype::kFloat16))},
        {"bias of queries, bf16", with_bias(bias_of(queries, Dtype::kBFloat16))},
        {"two biases", with_bias(odd, bias_of(one, Dtype::kFloat16))},
        {"mask", ScoreSpec{.mask = {.kind = MaskKind::kBool}}},
        {"mask of bits", ScoreSpec{.mask = {.kind = MaskKind::kBits, .hides_rows = true}}},
        {"sink", ScoreSpec{.sink = SinkKind::kHead}},
        {"sink of queries, fp16",
         ScoreSpec{.sink = SinkKind::kQuery, .sink_dtype = Dtype::kFloat16}},
        {"dropout", ScoreSpec{.dropout_p = 0.17}},
        {"query scale", ScoreSpec{.query_scale = true}},
        {"max logit", ScoreSpec{.max_logit = true}},
        all_options()};
  }();
  return all;
}

const std::vector<NamedScores>& matrix_score_pairs() {
  static const std::vector<NamedScores> all = [] {
    const std::vector<NamedScores> alone = {
        {"softcap", ScoreSpec{.softcap = 2}},
        {"alibi", ScoreSpec{.alibi = 2}},
        {"bias", with_bias(bias_of({}, Dtype::kBFloat16))},
        {"mask", ScoreSpec{.mask = {.kind = MaskKind::kBool, .hides_rows = true}}},
        {"sink", ScoreSpec{.sink = SinkKind::kQuery}},
        {"dropout", ScoreSpec{.dropout_p = 0.17}},
        {"query scale", ScoreSpec{.query_scale = true}},
        {"max logit", ScoreSpec{.max_logit = true}}};
    std::vector<NamedScores> pairs;
    for (size_t i = 0; i < alone.size(); ++i) {
      for (size_t j = i + 1; j < alone.size(); ++j)
        pairs.push_back(
            {alone[i].name + " and " + alone[j].name, joined(alone[i].spec, alone[j].spec)});
    }
    return pairs;
  }();
  return all;
}

std::vector<int> score_matrix_levels() {
  const auto size = [](const auto& levels) { return static_cast<int>(levels.size()); };
  return {4,
          size(score_matrix_head_dims()),
          size(score_matrix_masks()),
          size(score_matrix_sequences()),
          size(kScoreMatrixHeads),
          size(kScoreMatrixLayouts),
          2,
          2};
}

std::vector<Choice> rows_of_options() {
  std::vector<int> levels = score_matrix_levels();
  levels.push_back(static_cast<int>(matrix_scores().size()));
  CoveringArray array(levels, [](const Choice&) { return true; });
  array.extend(2);
  return array.rows();
}

std::vector<Choice> rows_for_options() {
  CoveringArray array(score_matrix_levels(), [](const Choice&) { return true; });
  array.extend(3);
  return array.rows();
}

const std::vector<Cell>& score_matrix() {
  static const std::vector<Cell> all = [] {
    std::vector<Cell> cells;
    const auto add = [&](const Choice& row, const NamedScores& scores, bool in_pairs) {
      const int index = kFirstScoreCell + static_cast<int>(cells.size());
      cells.push_back(score_cell_of(row, scores, index, in_pairs));
    };
    for (const Choice& row : rows_of_options())
      add(row, matrix_scores()[static_cast<size_t>(row.back())], true);
    const std::vector<Choice> rows = rows_for_options();
    for (const NamedScores& scores : matrix_scores()) {
      for (const Choice& row : rows) add(row, scores, false);
    }
    const std::vector<NamedScores>& pairs = matrix_score_pairs();
    for (size_t i = 0; i < rows.size(); ++i) add(rows[i], pairs[i % pairs.size()], false);
    return cells;
  }();
  return all;
}

Cell on_cuda(Cell cell, int factor) {
  cell.dtype = cell.index % 2 == 0 ? Dtype::kFloat16 : Dtype::kBFloat16;
  cell.head_dims = {factor * cell.head_dims.qk, factor * cell.head_dims.v};
  return cell;
}

ScoreRefusals expected_score_refusals(const Cell& cell) {
  if (!cell.spec.keys_in_cache) return {};
  const std::string page = "page_size is " + std::to_string(cell.spec.seqlen_k);
  const double p = cell.spec.scores.dropout_p;
  if (p == 0) return {"", page + " in a backward; allowed: 0, a key/value cache has no gradient"};
  char drop[40];
  std::snprintf(drop, sizeof drop, "dropout_p is %g and ", p);
  const std::string both = drop + page + "; allowed: 0 over a key/value cache";
  return {both, both};
}

}  // namespace flashtile::test
