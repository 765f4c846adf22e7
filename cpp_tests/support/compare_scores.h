// The error bound of compare.h for what calls write of scores: gradients of biases, slopes and
// sinks, each as a whole, and the largest logits.
//
// The floor: half a unit of the largest value; the noise of sums in fp32 (fp64 of fp64 problems),
// 1e-5 (1e-13) times the largest sum of the absolute values of what is added up, dS and the delta
// in it, which may cancel dP; and what rounding out does. Every element of a row's dS has the same
// dot(out, dout) in it, so the errors that out's rounding makes of it do not cancel in a sum over
// keys: a unit of the dtype times their root mean square.
#pragma once

#include "compare.h"
#include "runner.h"

namespace flashtile::test {

// Everything that a run gave.
Verdict compare(const Setup& setup, const Truth& truth, const RunResult& result);

}  // namespace flashtile::test
