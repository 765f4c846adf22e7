// The table of cases that every runner uses: the kernels on the machine and on a GPU, the CPU op,
// the libtorch test. Here shapes, options and varlen; the groups of contract_cases.h belong to it.
#pragma once

#include <initializer_list>
#include <vector>

#include "case.h"
#include "contract_cases.h"

namespace flashtile::test {

std::vector<Case> joined(std::initializer_list<std::vector<Case>> groups);

// Lengths around the block edges 16, 32, 64, 128, and queries longer and shorter than keys.
std::vector<Case> shape_cases();

// Heads that share keys; layouts; values that break careless softmax; determinism.
std::vector<Case> option_cases();

std::vector<Case> varlen_cases();

// Longer runs of the same kinds, for make test-long.
std::vector<Case> long_cases();

}  // namespace flashtile::test
