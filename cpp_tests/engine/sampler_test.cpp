// The sampler of examples/engine: frequencies against the probabilities that they should have.
#include "sampler.h"

#include <cmath>
#include <vector>

#include "check.h"

namespace {

constexpr int kDraws = 20000;
const std::vector<float> kLogits = {0.5f, 2.0f, -1.0f, 1.5f, 2.0f, -30.0f};

std::vector<double> frequencies(const engine::Sampling& sampling) {
  std::mt19937_64 random(sampling.seed);
  std::vector<double> count(kLogits.size());
  for (int i = 0; i < kDraws; ++i) count[engine::sample(kLogits, sampling, random)] += 1.0 / kDraws;
  return count;
}

}  // namespace

TEST("without a temperature the first of the largest is taken, and nothing is drawn") {
  std::mt19937_64 random(7);
  CHECK_EQ(engine::sample(kLogits, {}, random), 1);
  CHECK(random == std::mt19937_64(7));
}

TEST("tokens are as frequent as softmax(logits / temperature) says") {
  for (const float temperature : {0.5f, 1.0f, 3.0f}) {
    const std::vector<double> found = frequencies({.temperature = temperature, .seed = 3});
    double sum = 0;
    for (const float logit : kLogits) sum += std::exp(logit / temperature);
    for (size_t i = 0; i < kLogits.size(); ++i) {
      const double p = std::exp(kLogits[i] / temperature) / sum;
      CHECK(std::abs(found[i] - p) < 4 * std::sqrt(p * (1 - p) / kDraws) + 1e-4);
    }
  }
}

TEST("top_p keeps the most likely tokens that reach it, and at least one") {
  // 1 and 4 have 0.34 each, then 3 has 0.21
  const std::vector<double> two = frequencies({.temperature = 1, .top_p = 0.6f, .seed = 5});
  CHECK(two[1] > 0.45 && two[4] > 0.45 && two[1] + two[4] > 0.9999);
  const std::vector<double> three = frequencies({.temperature = 1, .top_p = 0.8f, .seed = 5});
  CHECK(three[3] > 0.2 && three[1] + three[3] + three[4] > 0.9999);
  CHECK(frequencies({.temperature = 1, .top_p = 0, .seed = 5})[1] > 0.9999);
}

TEST("equal seeds give equal tokens, others do not") {
  const auto draw = [](uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> tokens(50);
    for (int32_t& token : tokens) {
      token = engine::sample(kLogits, {.temperature = 1, .top_p = 0.95f}, random);
    }
    return tokens;
  };
  CHECK(draw(1) == draw(1));
  CHECK(draw(1) != draw(2));
}
