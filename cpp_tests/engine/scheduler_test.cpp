// The scheduler of examples/engine over a cache that holds tokens instead of keys: before every
// step, the rows that each sequence is going to read must be its own tokens, whatever was shared,
// copied or taken away.
#include "scheduler.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <stdexcept>

#include "check.h"

namespace {

using Tokens = std::vector<int32_t>;

engine::Request request(const std::string& id, Tokens prompt, int64_t max_tokens) {
  engine::Request result;
  result.id = id;
  result.prompt = std::move(prompt);
  result.max_tokens = max_tokens;
  return result;
}

// A model without weights: what comes next depends on all tokens so far.
int32_t next_token(const Tokens& tokens) {
  uint32_t hash = 2166136261u;
  for (const int32_t token : tokens) hash = (hash ^ static_cast<uint32_t>(token)) * 16777619u;
  return static_cast<int32_t>(hash % 1000);
}

Tokens expected_answer(Tokens tokens, int64_t count) {
  const auto prompt = static_cast<int64_t>(tokens.size());
  for (int64_t i = 0; i < count; ++i) tokens.push_back(next_token(tokens));
  return {tokens.begin() + prompt, tokens.end()};
}

class Simulation {
 public:
  Simulation(const engine::Limits& limits, int32_t pages)
      : scheduler(limits, pages), rows_(pages * limits.page_size, -1) {}

  // One step of the engine; false when there was nothing to do.
  bool step() {
    const engine::Step step = scheduler.plan();
    const int64_t size = scheduler.limits().page_size;
    for (const engine::PageCopy copy : step.copies) {
      std::copy_n(rows_.begin() + copy.from * size, size, rows_.begin() + copy.to * size);
      ++copies;
    }
    int64_t tokens = 0;
    for (const engine::Slice& slice : step.slices) {
      write(slice);
      tokens += slice.count;
    }
    CHECK(tokens <= scheduler.limits().max_step_tokens);
    CHECK(scheduler.running() <= scheduler.limits().max_sequences);
    mixed |= has_both(step);
    for (const engine::Slice& slice : step.slices) read(slice);
    for (const engine::Slice& slice : step.slices) advance(slice);
    return !step.slices.empty();
  }

  engine::Scheduler scheduler;
  std::map<std::string, Tokens> answers;
  int64_t copies = 0, shared = 0;
  bool mixed = false;  // a step had both a decoding sequence and a prompt

 private:
  int32_t& row(const engine::Sequence& sequence, int64_t i) {
    const int64_t size = scheduler.limits().page_size;
    return rows_.at(sequence.pages.at(i / size) * size + i % size);
  }

  static bool has_both(const engine::Step& step) {
    const auto decodes = [](const engine::Slice& slice) {
      return slice.count == 1 && slice.sequence->generated() > 0;
    };
    return std::ranges::any_of(step.slices, decodes) && !std::ranges::all_of(step.slices, decodes);
  }

  void write(const engine::Slice& slice) {
    const engine::Sequence& sequence = *slice.sequence;
    CHECK(slice.count >= 1);
    for (int64_t i = sequence.computed; i < sequence.computed + slice.count; ++i) {
      const int64_t page = sequence.pages.at(i / scheduler.limits().page_size);
      CHECK_EQ(scheduler.pages().holders(static_cast<int32_t>(page)), 1);
      row(sequence, i) = sequence.tokens.at(i);
    }
  }

  void read(const engine::Slice& slice) {
    for (int64_t i = 0; i < slice.sequence->computed + slice.count; ++i) {
      CHECK_EQ(row(*slice.sequence, i), slice.sequence->tokens[i]);
    }
  }

  void advance(const engine::Slice& slice) {
    engine::Sequence& sequence = *slice.sequence;
    const bool samples = slice.samples();
    sequence.computed += slice.count;
    if (!samples) return;
    sequence.tokens.push_back(next_token(sequence.tokens));
    answers[sequence.request.id].push_back(sequence.tokens.back());
    if (sequence.generated() < sequence.request.max_tokens) return;
    shared += sequence.shared;
    scheduler.remove(sequence.request.id);
  }

  Tokens rows_;  // [pages * page_size], the token of each row
};

engine::Limits small_limits() {
  return {.page_size = 4, .max_seqlen = 64, .max_sequences = 8, .max_step_tokens = 16};
}

Tokens count_up(int32_t from, int32_t count) {
  Tokens tokens(count);
  for (int32_t i = 0; i < count; ++i) tokens[i] = from + i;
  return tokens;
}

void run(Simulation& simulation) {
  for (int i = 0; simulation.step(); ++i) {
    if (i > 10000) throw std::runtime_error("the scheduler does not come to an end");
  }
}

}  // namespace

TEST("a prompt longer than a step is computed in pieces") {
  Simulation simulation(small_limits(), 32);
  simulation.scheduler.add(request("a", count_up(0, 40), 3));
  for (int i = 0; i < 2; ++i) simulation.step();
  CHECK(simulation.answers["a"].empty());
  run(simulation);
  CHECK(simulation.answers["a"] == expected_answer(count_up(0, 40), 3));
  CHECK_EQ(simulation.scheduler.pages().in_use(), 0);
}

TEST("a long prompt does not hold up sequences that decode") {
  Simulation simulation(small_limits(), 64);
  simulation.scheduler.add(request("short", count_up(100, 2), 6));
  simulation.step();
  simulation.scheduler.add(request("long", count_up(0, 50), 1));
  for (size_t answered = 1; answered <= 3; ++answered) {
    CHECK_EQ(simulation.answers["short"].size(), answered);
    simulation.step();
  }
  CHECK(simulation.mixed);
  CHECK(simulation.answers["long"].empty());  // 3 steps of 15 tokens
  run(simulation);
  CHECK(simulation.answers["long"] == expected_answer(count_up(0, 50), 1));
}

TEST("equal beginnings are shared, and copied where they part") {
  Simulation simulation(small_limits(), 32);
  Tokens prompt = count_up(0, 15);
  simulation.scheduler.add(request("a", prompt, 20));
  simulation.step();
  CHECK_EQ(simulation.scheduler.pages().in_use(), 4);
  prompt[14] = 999;  // differs inside the fourth page
  simulation.scheduler.add(request("b", prompt, 20));
  simulation.step();
  CHECK_EQ(simulation.copies, 1);
  CHECK_EQ(simulation.scheduler.pages().in_use(), 5);  // three of four pages are shared
  CHECK_EQ(simulation.scheduler.pages().holders(0), 2);
  run(simulation);
  CHECK_EQ(simulation.shared, 14);
  CHECK(simulation.answers["a"] == expected_answer(count_up(0, 15), 20));
  CHECK(simulation.answers["b"] == expected_answer(prompt, 20));
  CHECK_EQ(simulation.scheduler.pages().in_use(), 0);
}

TEST("an equal prompt still computes its last token") {
  Simulation simulation(small_limits(), 32);
  simulation.scheduler.add(request("a", count_up(0, 8), 9));
  simulation.step();
  simulation.scheduler.add(request("b", count_up(0, 8), 9));
  run(simulation);
  CHECK_EQ(simulation.shared, 7);
  CHECK(simulation.answers["a"] == simulation.answers["b"]);
}

TEST("sequences that lose their pages go on where they were") {
  Simulation simulation(small_limits(), 10);
  for (int32_t i = 0; i < 4; ++i) {
    simulation.scheduler.add(request(std::to_string(i), count_up(100 * i, 6), 20));
  }
  run(simulation);
  CHECK(simulation.scheduler.preemptions() > 0);
  for (int32_t i = 0; i < 4; ++i) {
    CHECK(simulation.answers[std::to_string(i)] == expected_answer(count_up(100 * i, 6), 20));
  }
  CHECK_EQ(simulation.scheduler.pages().in_use(), 0);
  CHECK_EQ(simulation.scheduler.pages().peak(), 10);
}

TEST("requests that can never run are refused with a sentence") {
  const engine::Scheduler scheduler(small_limits(), 10);
  const auto says = [&](const engine::Request& asked, const std::string& what) {
    const std::optional<std::string> reason = scheduler.refuse(asked);
    CHECK_EQ(reason.value_or("nothing"), what);
  };
  says(request("a", {}, 1), "prompt is empty; allowed: 1 token and more");
  says(request("a", {1}, 0), "max_tokens is below 1; allowed: 1 and more");
  says(request("a", count_up(0, 60), 5),
       "prompt has 60 tokens and max_tokens is 5; allowed: 64 tokens together");
  says(request("a", count_up(0, 1), INT64_MAX),
       "prompt has 1 tokens and max_tokens is 9223372036854775807; allowed: 64 tokens together");
  says(request("a", count_up(0, 38), 4),
       "prompt has 38 tokens and max_tokens is 4, which takes 11 pages; allowed: 10");
  CHECK(!scheduler.refuse(request("a", count_up(0, 38), 3)).has_value());
}

TEST("the longest request that is admitted fits alone") {
  Simulation simulation(small_limits(), 10);
  simulation.scheduler.add(request("a", count_up(0, 38), 3));
  run(simulation);
  CHECK(simulation.answers["a"] == expected_answer(count_up(0, 38), 3));
}

TEST("what is removed gives its pages back, waiting or running") {
  Simulation simulation(small_limits(), 10);
  simulation.scheduler.add(request("a", count_up(0, 20), 20));
  simulation.scheduler.add(request("b", count_up(100, 30), 8));
  simulation.step();
  CHECK_EQ(simulation.scheduler.waiting(), 1);
  CHECK(simulation.scheduler.has("b"));
  CHECK(simulation.scheduler.remove("b") != nullptr);
  CHECK(!simulation.scheduler.has("b"));
  CHECK(simulation.scheduler.remove("a") != nullptr);
  CHECK(simulation.scheduler.remove("a") == nullptr);
  CHECK_EQ(simulation.scheduler.pages().in_use(), 0);
}

TEST("limits that leave no token for a sequence are refused") {
  bool refused = false;
  try {
    engine::Scheduler scheduler({.max_sequences = 8, .max_step_tokens = 7}, 4);
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("at least max_sequences, 8") != std::string::npos;
  }
  CHECK(refused);
}

TEST("random requests, arrivals and removals: everybody gets the answer of running alone") {
  int64_t preemptions = 0, copies = 0, shared = 0;
  for (uint32_t seed = 1; seed <= 150; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](uint32_t bound) { return static_cast<int32_t>(random() % bound); };
    engine::Limits limits{.page_size = 1 + below(6), .max_seqlen = 60};
    limits.max_sequences = 1 + below(8);
    limits.max_step_tokens = limits.max_sequences + below(20);
    Simulation simulation(limits, 60 / static_cast<int32_t>(limits.page_size) + below(30));
    std::map<std::string, engine::Request> asked;
    std::set<std::string> removed;
    for (int step = 0, arrived = 0; simulation.step() || arrived < 25; ++step) {
      if (step > 10000) throw std::runtime_error("the scheduler does not come to an end");
      if (arrived < 25 && below(3) == 0) {
        // A common beginning of any length, and tokens of its own.
        Tokens prompt = count_up(0, below(30));
        for (int32_t i = below(8); i >= 0; --i) prompt.push_back(500 + below(3));
        const std::string id = std::to_string(arrived++);
        const engine::Request made = request(id, prompt, 1 + below(25));
        if (simulation.scheduler.refuse(made)) continue;
        asked[id] = made;
        simulation.scheduler.add(made);
      }
      if (below(40) == 0 && !asked.empty()) {
        const std::string id = std::to_string(below(static_cast<uint32_t>(arrived)));
        if (simulation.scheduler.remove(id)) removed.insert(id);
      }
    }
    for (const auto& [id, made] : asked) {
      const Tokens expected = expected_answer(made.prompt, made.max_tokens);
      const Tokens& answer = simulation.answers[id];
      CHECK(std::equal(answer.begin(), answer.end(), expected.begin()));
      CHECK(answer.size() == expected.size() || removed.contains(id));
    }
    CHECK_EQ(simulation.scheduler.pages().in_use(), 0);
    preemptions += simulation.scheduler.preemptions();
    copies += simulation.copies;
    shared += simulation.shared;
  }
  std::printf("%lld preemptions, %lld copied pages, %lld shared rows\n",
              static_cast<long long>(preemptions), static_cast<long long>(copies),
              static_cast<long long>(shared));
  CHECK(preemptions > 100 && copies > 100 && shared > 100);
}
