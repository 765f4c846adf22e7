// Chooses a token from its logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>

#include "sequence.h"

namespace engine {

// The smallest token with the largest logit or, with a temperature, one drawn from softmax(logits /
// temperature) restricted to the most likely tokens whose probabilities reach top_p. Equal logits
// and an equal state of `random` give an equal token.
int32_t sample(std::span<const float> logits, const Sampling& sampling, std::mt19937_64& random);

}  // namespace engine
