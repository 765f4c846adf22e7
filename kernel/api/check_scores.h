// The checks of problem.scores, of its gradients and of max_logit, and their way into params.h.
#pragma once

#include <cstddef>
#include <span>

#include "api/check_parts.h"

namespace flashtile {

// A tensor of scores with the extents that its strides run over: batch, heads, queries, keys.
struct ScoreArgument {
  const char* name = "";
  ScoreView view;
  int64_t extents[4] = {};
  bool written = false;
};

// Those of a call that exist.
class ScoreArguments {
 public:
  void add(const ScoreArgument& argument) { all_[count_++] = argument; }
  std::span<const ScoreArgument> all() const { return {all_, count_}; }

 private:
  static constexpr size_t kMost = 12;
  ScoreArgument all_[kMost];
  size_t count_ = 0;
};

// p.problem is there and converted: what is behind it, and what `p` wants to be written.
Status convert_scores(const flashtile_forward_params& p, const Problem& problem, Scores& scores);
Status convert_scores(const flashtile_backward_params& p, const Problem& problem, Scores& scores);

// On the CPU, where lengths can be read: that bias and mask reach over every sequence.
Status check_score_lengths(const Target& target, const Problem& problem, const Scores& scores);

ScoreArguments score_arguments(const Problem& problem, const Scores& scores);

}  // namespace flashtile
