// What users of FlashAttention-2 run, as its test suite draws it: dropout 0 and 0.17, ALiBi slopes
// of (heads) and (batch, heads), softcap 0 and 50, MHA, MQA and GQA, windows, causal masks,
// deterministic gradients, pairs of lengths, dense and varlen.
#pragma once

#include <vector>

#include "case.h"

namespace flashtile::test {

struct UsualCase {
  Case spec;
  HeadDims head_dims = 64;
  Mask mask;
  Dtype dtype = Dtype::kFloat16;
};

// Which pairs of lengths a run takes: what the time allows.
enum class Lengths { kShort, kLong };

// Every two of the parameters in some case.
std::vector<UsualCase> usual_cases(const std::vector<HeadDims>& all_head_dims, Lengths lengths);

}  // namespace flashtile::test
