// Fills the tensors of a case's scores: where a sequence has queries and keys, from a seed; all
// else is poison.
#pragma once

#include <cstdint>
#include <vector>

#include "manual_attention.h"
#include "normal.h"
#include "scores.h"

namespace flashtile::test {

void fill_score_tensors(const std::vector<Span>& spans, int heads, const ScoreSizes& sizes,
                        Normal& normal, ScoreInput& scores);

// What is read by row of q.
void fill_row_tensors(int64_t row_batch, int64_t rows, int heads, const ScoreSizes& sizes,
                      Normal& normal, ScoreInput& scores);

}  // namespace flashtile::test
