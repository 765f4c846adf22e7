// Cases of scores: every option alone, in the forms that it has, all together, and the shapes that
// they run on.
#pragma once

#include <string>
#include <vector>

#include "case.h"

namespace flashtile::test {

struct NamedScores {
  std::string name;
  ScoreSpec spec;
};

BiasSpec bias_of(Dims dims, Dtype dtype = Dtype::kFloat32);

ScoreSpec with_bias(const BiasSpec& first, const BiasSpec& second = {});

// Both: of an option that both have, the first one's, but for a second bias.
ScoreSpec joined(const ScoreSpec& a, const ScoreSpec& b);

// Every option alone, in the forms that it has.
std::vector<NamedScores> single_options();

NamedScores all_options();

// Few queries are decoded, many are not; 1100 keys are cut into parts.
std::vector<Case> score_shapes();

}  // namespace flashtile::test
