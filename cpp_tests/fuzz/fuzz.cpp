// Random cases against manual attention in fp64, until the time or the number of cases is up.
//
//   fuzz --backend cpu --seconds 30               cases with the seeds 1, 2, 3, ...
//   fuzz --backend machine --seed 123 --cases 1   one case again, as a failure prints it
//   fuzz --backend cpu --plant all                how many cases it takes to find each planted bug
//   fuzz --backend cpu --cache ...                cases of key/value caches instead
//   fuzz --backend cpu --scores ...               cases with any subset of the options of scores
//
// Options: --head-dims LOW-HIGH narrows what is drawn, --device sm_80 the models of the machine; on
// the CPU --device is an instruction set. --find ends at the first failure, successfully: a bug
// that is planted in the code is to be found.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "plants.h"
#include "random_scores.h"
#include "target.h"

using namespace flashtile::test;

namespace {

enum class Kind { kTensors, kCache, kScores };

struct Options {
  std::string backend = "cpu", device, plant;
  double seconds = 1e9;
  uint64_t cases = UINT64_MAX, seed = 1;
  int least_head_dim = 1, largest_head_dim = 256;
  bool find = false;
  Kind kind = Kind::kTensors;
};

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

bool read_option(Options& options, const std::string& key, const char* value) {
  if (key == "--backend") {
    options.backend = value;
  } else if (key == "--device") {
    options.device = value;
  } else if (key == "--plant") {
    options.plant = value;
  } else if (key == "--seconds") {
    options.seconds = std::atof(value);
  } else if (key == "--cases") {
    options.cases = std::strtoull(value, nullptr, 10);
  } else if (key == "--seed") {
    options.seed = std::strtoull(value, nullptr, 10);
  } else if (key == "--head-dims") {
    return std::sscanf(value, "%d-%d", &options.least_head_dim, &options.largest_head_dim) == 2;
  } else {
    return false;
  }
  return true;
}

bool read_flag(Options& options, const std::string& key) {
  if (key == "--find") {
    options.find = true;
  } else if (key == "--cache") {
    options.kind = Kind::kCache;
  } else if (key == "--scores") {
    options.kind = Kind::kScores;
  } else {
    return false;
  }
  return true;
}

bool read_options(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (read_flag(options, key)) continue;
    ++i;
    if (i == argc || !read_option(options, key, argv[i])) {
      std::printf("unknown or incomplete option %s; fuzz.cpp says what there is\n", key.c_str());
      return false;
    }
  }
  return options.backend == "cpu" || options.backend == "machine";
}

// A case of a seed, perhaps with a bug planted.
struct Drawn {
  std::function<std::string()> name;
  std::function<Attempt()> attempt;
};

Drawn draw_tensors(uint64_t seed, const FuzzTarget& target, const std::string& planted) {
  const FuzzCase c = random_case(seed, target.range);
  return {[=] { return c.setup(seed).name(); },
          [=, &target] {
            return attempt_draws(seed, [&](uint64_t values_seed) {
              const Setup setup = c.setup(values_seed);
              AttentionInput input = manual_input(setup);
              for (const Plant& plant : plants()) {
                if (plant.name == planted) plant.change(setup, input);
              }
              return target.attempt(setup, Truth(setup, input), seed);
            });
          }};
}

Drawn draw_cache(uint64_t seed, const FuzzTarget& target, const std::string& planted) {
  const FuzzCache c = random_cache(seed, target.range);
  return {[=] { return c.name(); },
          [=, &target] {
            return attempt_draws(seed, [&](uint64_t values_seed) {
              return attempt_cache(c, values_seed, target.cache, [&](AttentionInput& input) {
                for (const CachePlant& plant : cache_plants()) {
                  if (plant.name == planted) plant.change(c.spec, input);
                }
              });
            });
          }};
}

Drawn draw_scores(uint64_t seed, const FuzzTarget& target, const std::string& planted) {
  const FuzzCase c = random_scored_case(seed, target.range);
  return {[=] { return c.setup(seed).name() + name_of(c.spec); },
          [=, &target] {
            return attempt_draws(seed, [&](uint64_t values_seed) {
              const Setup setup = c.setup(values_seed);
              ScoreInput changed = setup.scores;
              for (const ScorePlant& plant : score_plants()) {
                if (plant.name == planted) plant.change(changed);
              }
              AttentionInput input = manual_input(setup);
              input.scores = &changed;
              return target.attempt(setup, Truth(setup, input), seed);
            });
          }};
}

Drawn draw_case(Kind kind, uint64_t seed, const FuzzTarget& target, const std::string& planted) {
  switch (kind) {
    case Kind::kCache: return draw_cache(seed, target, planted);
    case Kind::kScores: return draw_scores(seed, target, planted);
    default: return draw_tensors(seed, target, planted);
  }
}

std::vector<std::string> plant_names(const Options& options) {
  std::vector<std::string> names;
  const auto add = [&](const char* name) {
    if (options.plant == "all" || options.plant == name) names.emplace_back(name);
  };
  switch (options.kind) {
    case Kind::kTensors:
      for (const Plant& plant : plants()) add(plant.name);
      break;
    case Kind::kCache:
      for (const CachePlant& plant : cache_plants()) add(plant.name);
      break;
    case Kind::kScores:
      for (const ScorePlant& plant : score_plants()) add(plant.name);
      break;
  }
  return names;
}

std::string place(const Options& options) {
  return options.backend + (options.device.empty() ? "" : " " + options.device) +
         (options.kind == Kind::kCache    ? " (caches)"
          : options.kind == Kind::kScores ? " (scores)"
                                          : "");
}

std::string reproducer(const Options& options, uint64_t seed) {
  std::string text =
      "fuzz --backend " + options.backend + " --seed " + std::to_string(seed) + " --cases 1";
  if (options.kind == Kind::kCache) text += " --cache";
  if (options.kind == Kind::kScores) text += " --scores";
  if (!options.device.empty()) text += " --device " + options.device;
  if (options.least_head_dim != 1 || options.largest_head_dim != 256) {
    text += " --head-dims " + std::to_string(options.least_head_dim) + "-" +
            std::to_string(options.largest_head_dim);
  }
  return text;
}

struct Tally {
  uint64_t cases = 0, failures = 0;
  double seconds = 0.0;
};

// Runs cases from options.seed on; stops at the first failure when `stop` is set.
Tally run_cases(const Options& options, const FuzzTarget& target, const std::string& plant,
                bool stop) {
  const double start = now();
  Tally tally;
  while (tally.cases < options.cases && tally.seconds < options.seconds) {
    const uint64_t seed = options.seed + tally.cases;
    const Drawn drawn = draw_case(options.kind, seed, target, plant);
    std::string wrong;
    try {
      wrong = drawn.attempt().wrong;
    } catch (const std::exception& error) {
      wrong = error.what();
    }
    ++tally.cases;
    tally.seconds = now() - start;
    if (wrong.empty()) continue;
    ++tally.failures;
    if (plant.empty() && tally.failures <= 20) {
      std::printf("FAIL %s\n    %s %s\n", reproducer(options, seed).c_str(), drawn.name().c_str(),
                  wrong.c_str());
    }
    if (stop) break;
  }
  return tally;
}

// 0 when every planted bug was found.
int find_plants(const Options& options, const FuzzTarget& target) {
  int missed = 0;
  for (const std::string& plant : plant_names(options)) {
    const Tally tally = run_cases(options, target, plant, /*stop=*/true);
    if (tally.failures > 0) {
      std::printf("planted %s on the %s: found by case %llu, after %.1f s\n", plant.c_str(),
                  place(options).c_str(), static_cast<unsigned long long>(tally.cases),
                  tally.seconds);
    } else {
      std::printf("planted %s on the %s: NOT found in %llu cases\n", plant.c_str(),
                  place(options).c_str(), static_cast<unsigned long long>(tally.cases));
      ++missed;
    }
  }
  return missed == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Options options;
  if (!read_options(argc, argv, options)) return 2;
  FuzzTarget target =
      options.backend == "cpu" ? cpu_target(options.device) : machine_target(options.device);
  if (options.kind == Kind::kCache && !target.cache.forward && target.unavailable.empty())
    target.unavailable = "its caches are not fuzzed";
  if (!target.unavailable.empty()) {
    std::printf("SKIP fuzz on the %s: %s\n", place(options).c_str(), target.unavailable.c_str());
    return 77;
  }
  target.range.least_head_dim = options.least_head_dim;
  target.range.largest_head_dim = options.largest_head_dim;
  if (!options.plant.empty()) return find_plants(options, target);
  const Tally tally = run_cases(options, target, "", options.find);
  std::printf("fuzz on the %s: %llu cases, seeds %llu to %llu, in %.0f s, %llu failed\n",
              place(options).c_str(), static_cast<unsigned long long>(tally.cases),
              static_cast<unsigned long long>(options.seed),
              static_cast<unsigned long long>(options.seed + tally.cases - 1), tally.seconds,
              static_cast<unsigned long long>(tally.failures));
  return (tally.failures == 0) == !options.find ? 0 : 1;
}
