#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace engine {
namespace {

// Uniform in [0, 1); std::uniform_real_distribution differs between standard libraries.
double uniform(std::mt19937_64& random) { return static_cast<double>(random() >> 11) * 0x1.0p-53; }

}  // namespace

int32_t sample(std::span<const float> logits, const Sampling& sampling, std::mt19937_64& random) {
  const auto largest = std::ranges::max_element(logits);
  if (sampling.temperature <= 0) return static_cast<int32_t>(largest - logits.begin());

  std::vector<double> weight(logits.size());  // softmax without its denominator
  std::ranges::transform(logits, weight.begin(), [&](float logit) {
    return std::exp((static_cast<double>(logit) - *largest) / sampling.temperature);
  });
  double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  std::vector<int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  if (sampling.top_p < 1) {
    std::ranges::stable_sort(tokens, [&](int32_t a, int32_t b) { return weight[a] > weight[b]; });
    size_t kept = 0;
    double sum = 0;
    while (kept < tokens.size() && (kept == 0 || sum < sampling.top_p * total)) {
      sum += weight[tokens[kept++]];
    }
    tokens.resize(kept);
    total = sum;
  }
  double rest = uniform(random) * total;
  for (const int32_t token : tokens) {
    rest -= weight[token];
    if (rest < 0) return token;
  }
  return tokens.back();  // rounding left a little
}

}  // namespace engine
