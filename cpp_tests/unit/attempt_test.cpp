// The rule of attempt.h for values drawn unluckily, on errors that are drawn from a model.
#include "../support/attempt.h"

#include <cmath>
#include <string>

#include "../support/check.h"

using namespace flashtile::test;

namespace {

constexpr int kCases = 2000;

// The least that a block can have: one number of each side, which matters in one of 5 draws.
// `worse` is how much larger the errors are than those of the dtype.
Attempt one_number(uint64_t seed, double worse) {
  constexpr int kBlocks = 5;
  Normal normal(seed);
  const auto matters = static_cast<int>(std::fabs(normal()) * 1e6) % kBlocks;
  Verdict verdict;
  for (int i = 0; i < kBlocks; ++i) {
    const double scale = i == matters ? 1.0 : 1e-3;
    verdict.backward.add_block({.tensor = "dk",
                                .row = i,
                                .error = worse * scale * std::fabs(normal()),
                                .rounding = scale * std::fabs(normal()),
                                .floor = 0.05 * scale});
  }
  return {.wrong = verdict.passed() ? "" : "alone" + verdict.text(),
          .wrong_values_only = !verdict.passed(),
          .result = {},
          .verdicts = {verdict}};
}

struct Misses {
  int alone = 0, together = 0;
};

Misses count_misses(double worse) {
  Misses misses;
  for (int i = 0; i < kCases; ++i) {
    const uint64_t seed = static_cast<uint64_t>(i) * 1000003;
    const auto draw = [&](uint64_t drawn) { return one_number(drawn, worse); };
    misses.alone += !draw(seed).passed();
    misses.together += !attempt_draws(seed, draw).passed();
  }
  return misses;
}

// Draws of which the first misses the bound narrowly and all others are sound, but for what
// `change` makes of the tenth.
template <class Change>
Attempt tenth_changed(const Change& change) {
  const auto draw = [&](uint64_t seed) {
    Verdict verdict;
    verdict.forward.add_block(
        {.tensor = "out", .error = seed == 0 ? 3.0 : 0.5, .rounding = 1.0, .floor = 0.0});
    if (seed > 0) verdict.forward.blocks[0].rounding = 0.9;
    Attempt attempt{.wrong = verdict.text(),
                    .wrong_values_only = !verdict.passed(),
                    .result = {},
                    .verdicts = {verdict}};
    if (seed == 9000) change(attempt);
    return attempt;
  };
  return attempt_draws(0, draw);
}

}  // namespace

TEST("errors as large as the dtype's pass, though some draws of them miss the bound") {
  const Misses misses = count_misses(1.0);
  CHECK_MESSAGE(misses.alone > kCases / 2, std::to_string(misses.alone) + " miss it alone");
  CHECK_MESSAGE(misses.together < kCases / 100, std::to_string(misses.together) + " miss it");
}

TEST("errors four times as large as the dtype's do not pass") {
  const Misses misses = count_misses(4.0);
  CHECK_MESSAGE(misses.together > kCases * 9 / 10, std::to_string(misses.together) + " found");
}

TEST("what is wrong in another draw than the first is wrong") {
  CHECK(!tenth_changed([](Attempt&) {}).passed());  // 3 of 1 is more than all others have
  const auto says = [](const char* text, const auto& change) {
    CHECK_MESSAGE(tenth_changed(change).wrong.find(text) != std::string::npos, text);
  };
  says("over 512 draws", [](Attempt&) {});
  says("a race", [](Attempt& attempt) {
    attempt.wrong = "a race";
    attempt.wrong_values_only = false;
  });
  says("NaN", [](Attempt& attempt) {
    attempt.wrong = "NaN";
    attempt.wrong_values_only = true;
    attempt.verdicts[0].forward.ratio = kInfinity;
  });
  const Attempt rescued =
      tenth_changed([](Attempt& attempt) { attempt.verdicts[0].forward.blocks[0].rounding = 2.0; });
  CHECK_EQ(rescued.wrong, std::string());
}
