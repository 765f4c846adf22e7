#include "matrix.h"

#include <algorithm>
#include <array>

namespace flashtile::test {

namespace {

constexpr std::array<Heads, 3> kMatrixHeads = {{{2, 2}, {4, 2}, {3, 1}}};
constexpr std::array<Layout, 7> kMatrixLayouts = {
    Layout::kDense,    Layout::kHeadMajor, Layout::kPadded,   Layout::kOdd,
    Layout::kSeqMajor, Layout::kMixed,     Layout::kBroadcast};

// Every slice; dims between two; dims that no 16 bytes divide; head_dim_v smaller and larger; and
// two that only the CPU serves.
const std::vector<HeadDims>& matrix_head_dims() {
  static const std::vector<HeadDims> all = {
      32,         64,         96,        128,      192, 256,  // slices
      8,          40,         72,        112,      160, 224,  // between
      1,          33,         65,        100,      147, 255,  // unaligned
      {64, 32},   {192, 128}, {256, 24}, {96, 70},            // head_dim_v smaller
      {32, 64},   {128, 192}, {40, 256}, {5, 97},             // larger
      {257, 257}, {64, 300}};
  return all;
}

const std::vector<Mask>& matrix_masks() {
  static const std::vector<Mask> all = {kFull,   kCausal, kCausalTopLeft, {20, 10},      {33, 0},
                                        {-1, 7}, {9, -1}, {0, 0},         {16, 40, true}};
  return all;
}

// Lengths on both sides of the blocks' edges; every kind of row that is not in use.
const std::vector<Case>& matrix_sequences() {
  static const std::vector<Case> all = {
      {.name = "square", .batch = 2, .seqlen_q = 65, .seqlen_k = 65},
      {.name = "more keys", .seqlen_q = 40, .seqlen_k = 170},
      {.name = "more queries", .seqlen_q = 170, .seqlen_k = 40},
      {.name = "one query", .batch = 2, .seqlen_q = 1, .seqlen_k = 100},
      {.name = "varlen", .lengths_q = {33, 0, 70}, .lengths_k = {70, 9, 0}},
      {.name = "varlen with tails",
       .lengths_q = {1, 64, 5},
       .lengths_k = {64, 17, 80},
       .tail_q = 40,
       .tail_k = 3},
      {.name = "in use",
       .batch = 3,
       .seqlen_q = 40,
       .seqlen_k = 90,
       .used_q = {40, 33, 0},
       .used_k = {65, 90, 20}},
      {.name = "varlen in use with tails",
       .lengths_q = {40, 17, 66},
       .lengths_k = {64, 33, 70},
       .used_q = {30, 17, 65},
       .used_k = {64, 0, 9},
       .tail_q = 2,
       .tail_k = 65}};
  return all;
}

Cell cell_of(const Choice& row, int index, bool in_pairs) {
  const auto level = [&](Factor factor) { return static_cast<size_t>(row[factor]); };
  Cell cell = {.index = index,
               .in_pairs = in_pairs,
               .spec = matrix_sequences()[level(kFactorSequences)],
               .dtype = static_cast<Dtype>(row[kFactorDtype]),
               .head_dims = matrix_head_dims()[level(kFactorHeadDims)],
               .mask = matrix_masks()[level(kFactorMask)]};
  set_options(row, kMatrixHeads[level(kFactorHeads)], kMatrixLayouts[level(kFactorLayout)], cell);
  return cell;
}

}  // namespace

std::vector<int> matrix_levels() {
  const auto size = [](const auto& levels) { return static_cast<int>(levels.size()); };
  return {4,
          size(matrix_head_dims()),
          size(matrix_masks()),
          size(matrix_sequences()),
          size(kMatrixHeads),
          size(kMatrixLayouts),
          2,
          2};
}

bool matrix_allows(const Choice& row) {
  if (row[kFactorLayout] < 0 || row[kFactorSequences] < 0) return true;
  const Case& sequences = matrix_sequences()[static_cast<size_t>(row[kFactorSequences])];
  const bool all_rows = sequences.used_q.empty() && sequences.tail_q == 0;
  return all_rows || kMatrixLayouts[static_cast<size_t>(row[kFactorLayout])] != Layout::kBroadcast;
}

void set_options(const Choice& row, const Heads& heads, Layout layout, Cell& cell) {
  cell.spec.heads = heads.q;
  cell.spec.heads_kv = heads.kv;
  cell.spec.layout = layout;
  cell.spec.deterministic = row[kFactorDeterministic] == 1;
  cell.spec.dlse = row[kFactorDlse] == 1;
  cell.spec.masks = {cell.mask};
  cell.spec.name = "cell " + std::to_string(cell.index) + ", " + cell.spec.name + ", heads " +
                   std::to_string(heads.q) + "/" + std::to_string(heads.kv) + ", " +
                   name_of(layout) + (cell.spec.deterministic ? ", deterministic" : "") +
                   (cell.spec.dlse ? "" : ", without dLSE");
}

const std::vector<Cell>& matrix() {
  static const std::vector<Cell> all = [] {
    CoveringArray array(matrix_levels(), matrix_allows);
    array.extend(2);
    const size_t pairs = array.rows().size();
    array.extend(3);
    std::vector<Cell> cells;
    cells.reserve(array.rows().size());
    for (size_t i = 0; i < array.rows().size(); ++i)
      cells.push_back(cell_of(array.rows()[i], static_cast<int>(i), i < pairs));
    return cells;
  }();
  return all;
}

std::string expected_refusal(const Cell& cell, bool on_cuda) {
  if (!on_cuda) return "";
  if (cell.dtype == Dtype::kFloat32) return "dtype is float32; allowed on CUDA: float16, bfloat16";
  if (cell.dtype == Dtype::kFloat64) return "dtype is float64; allowed on CUDA: float16, bfloat16";
  const auto [qk, v] = cell.head_dims;
  if (std::max(qk, v) <= 256) return "";
  return (qk >= v ? "head_dim is " + std::to_string(qk) : "head_dim_v is " + std::to_string(v)) +
         "; allowed on CUDA in this build: 1 to 256";
}

}  // namespace flashtile::test
