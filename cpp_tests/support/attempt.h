// A setup run once somewhere and compared with its truth, and the rule for values drawn unluckily.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "compare_scores.h"
#include "runner.h"
#include "setup.h"

namespace flashtile::test {

// Bitwise, so that NaN equals NaN.
bool identical(const AttentionOutput& a, const AttentionOutput& b);
bool identical(const ScoreResults& a, const ScoreResults& b);
bool identical(const RunResult& a, const RunResult& b);

struct Attempt {
  std::string wrong;      // what went wrong, "" when nothing did
  bool finished = false;  // there are results, and a verdict on them
  bool wrong_values_only = false;
  RunResult result;
  std::vector<Verdict> verdicts;  // on the results: one, or one for each schedule

  bool passed() const { return wrong.empty(); }
  bool forward_passed() const;
  // Passed, or nothing is wrong but an error that is larger than the bound.
  bool has_comparable_values() const;
  double largest_ratio() const;
};

// Fills in the verdict of an attempt that has results.
void judge(const Setup& setup, const Truth& truth, Attempt& attempt);

// The bound of compare.h measures against the dtype's own error on the same values: a maximum over
// the roundings of a block of 16 rows. Where few roundings enter it can happen to be far below what
// is typical, and a sound result then misses the bound. An example: one query, and one key that
// takes all its weight. The error of that key's dk is a multiple of the error of rowsum(out *
// dout), one number here and one in the dtype. Of two such numbers one is more than four times the
// other in 16 of 100 draws.
//
// So after a narrow miss the same setup is run with other values, and the bound holds for all draws
// together: each side is its largest value in a block over all of them. Where the rare draws in
// which the block matters are few among the first 8, there are 32, 128 or 512, as long as the miss
// becomes narrower. An error that is larger than the bound allows in every draw stays so.
Attempt attempt_draws(uint64_t seed, const std::function<Attempt(uint64_t)>& draw);

// Twice, with the same bits, when the setup is deterministic.
Attempt attempt_on_cpu(const Setup& setup, const Truth& truth);

// `make(seed)`: the setup with the values of a seed.
Attempt attempt_draws_on_cpu(uint64_t seed, const std::function<Setup(uint64_t)>& make);

}  // namespace flashtile::test
