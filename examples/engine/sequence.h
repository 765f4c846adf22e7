// A request, and what becomes of it while it runs.
#pragma once

#include <chrono>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace engine {

using Clock = std::chrono::steady_clock;

struct Sampling {
  float temperature = 0;  // 0: the most likely token
  float top_p = 1;        // sampled from the most likely tokens that have this probability together
  uint64_t seed = 0;
};

struct Request {
  std::string id;
  std::vector<int32_t> prompt;  // tokens
  int64_t max_tokens = 16;      // generated at most
  Sampling sampling;
  std::vector<int32_t> stop;  // the first of these tokens ends the answer and is its last token
};

// `tokens` are the prompt and what was generated. Keys and values of the first `computed` of them
// are in the cache, in the rows of `pages`. A sequence that lost its pages has computed 0 and all
// its tokens: computing them again is all that it takes to go on.
struct Sequence {
  explicit Sequence(Request from)
      : request(std::move(from)), tokens(request.prompt), random(request.sampling.seed) {}

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t pending() const { return length() - computed; }
  int64_t generated() const { return length() - static_cast<int64_t>(request.prompt.size()); }

  Request request;
  std::vector<int32_t> tokens;
  int64_t computed = 0;
  std::vector<int32_t> pages;
  std::mt19937_64 random;  // survives preemption: a token is drawn once

  int64_t shared = 0;       // rows that were taken from other sequences
  int64_t preemptions = 0;  // times that the pages were taken away
  Clock::time_point arrival = Clock::now();
  double seconds_to_first_token = 0;
};

}  // namespace engine
