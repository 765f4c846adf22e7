#include "score_matrix_report.h"

#include "check.h"
#include "score_matrix.h"

namespace flashtile::test {

void report_score_cell(const Cell& cell, const std::string& where, const Run::Refusals& said,
                       const std::function<Attempt()>& attempt, MatrixReport& report) {
  const ScoreRefusals expected = expected_score_refusals(cell);
  const auto refused = [&](const char* pass, const std::string& sentence,
                           const std::string& wanted) {
    const bool right = sentence == wanted;
    CHECK_MESSAGE(right, where + ", " + pass + ": \"" + sentence + "\", not \"" + wanted + '"');
    if (wanted.empty()) return;
    report.add(cell, pass, right ? Outcome::kRefused : Outcome::kFailed, sentence);
  };
  refused("forward", said.forward, expected.forward);
  refused("backward", said.backward, expected.backward);
  if (!expected.forward.empty()) return;
  const Attempt result = attempt();
  CHECK_MESSAGE(result.passed(), where + ": " + result.wrong);
  const auto outcome = [](bool passed) { return passed ? Outcome::kPassed : Outcome::kFailed; };
  report.add(cell, "forward", outcome(result.forward_passed()));
  if (expected.backward.empty()) report.add(cell, "backward", outcome(result.passed()));
}

}  // namespace flashtile::test
