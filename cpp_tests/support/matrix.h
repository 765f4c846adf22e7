// The test matrix: every pair of {dtype, head dims, mask, sequences, heads, layout, deterministic,
// dLSE} in some row, then every three of them. Each row is run on every device, forward and
// backward, and must agree with fp64 or be refused with the sentence that expected_refusal()
// states.
//
// One table for the kernels on the PTX machine, the CPU op, the libtorch test, and, through
// list_cases, for pytest.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "case.h"
#include "covering.h"
#include "numbers.h"

namespace flashtile::test {

struct Cell {
  int index = 0;
  bool in_pairs = true;  // belongs to the rows that cover pairs; the others complete the triples
  Case spec;
  Dtype dtype = Dtype::kFloat16;
  HeadDims head_dims = 64;
  Mask mask;
};

struct Heads {
  int q, kv;
};
enum Factor : size_t {
  kFactorDtype,
  kFactorHeadDims,
  kFactorMask,
  kFactorSequences,
  kFactorHeads,
  kFactorLayout,
  kFactorDeterministic,
  kFactorDlse,
  kFactors
};

std::vector<int> matrix_levels();

// With broadcast tensors no row has memory of its own, so none can be poisoned as not in use.
bool matrix_allows(const Choice& row);

// What of a row is no level of a table, and the name of the cell.
void set_options(const Choice& row, const Heads& heads, Layout layout, Cell& cell);

// All rows: first those that cover every pair, then those that complete every three.
const std::vector<Cell>& matrix();

// The sentence with which the device must refuse a cell; "" when it must serve it.
std::string expected_refusal(const Cell& cell, bool on_cuda);

}  // namespace flashtile::test
