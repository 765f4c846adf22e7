// The axis of scores in the test matrix. Every option of flashtile_scores meets every row of a
// covering array of {dtype, head dims, mask, sequences, heads, layout, deterministic, dLSE} in
// which every three of these factors take every combination of their levels; and every two options
// meet some of these rows. Fewer levels than in matrix.h: those that scores can tell apart, and
// short lengths.
//
// The cells of CI's machine and of pytest, `in_pairs`, are the rows of an array in which every
// option meets every level of every other factor.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"
#include "score_cases.h"

namespace flashtile::test {

inline constexpr int kFirstScoreCell = 10000;  // behind those of matrix()

// Every option alone, in the forms that kernels tell apart, and all together. The mask of bits is
// one of the C API alone.
const std::vector<NamedScores>& matrix_scores();

// Every two options.
const std::vector<NamedScores>& matrix_score_pairs();

// In the order of Factor, without scores.
std::vector<int> score_matrix_levels();

// Rows in which every option, the last factor, meets every level of every other one.
std::vector<Choice> rows_of_options();
// Rows of the other factors, every three of them.
std::vector<Choice> rows_for_options();

const std::vector<Cell>& score_matrix();

// The cell on CUDA: a dtype that it has, and head dims of another slice where `factor` is not 1.
Cell on_cuda(Cell cell, int factor = 1);

// The sentences with which a pass must refuse a cell of score_matrix(); "" when it must serve it.
struct ScoreRefusals {
  std::string forward, backward;
};
ScoreRefusals expected_score_refusals(const Cell& cell);

}  // namespace flashtile::test
