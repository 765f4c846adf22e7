// More of the table in cases.h: windows and alignments, rows in use, few queries, head dims.
#pragma once

#include <vector>

#include "case.h"

namespace flashtile::test {

// Windows: bands that leave whole blocks, rows or keys out; lengths on and beside block edges.
std::vector<Case> window_cases();

// Rows in use, and rows that belong to no sequence: NaN in the inputs, 0 and -inf in the results.
std::vector<Case> used_cases();

// Few queries over many keys, on both sides of where the kernels for that take over: 512 keys that
// are seen, and 64 for every query times heads of a group.
std::vector<Case> few_query_cases();

// Few and small, to be multiplied with many head dims.
std::vector<Case> head_dim_cases();

// head_dim_v as head_dim: every slice, its edges, and dims that no 16 bytes divide.
std::vector<HeadDims> equal_head_dims();

// head_dim_v smaller and larger than head_dim.
std::vector<HeadDims> unequal_head_dims();

}  // namespace flashtile::test
