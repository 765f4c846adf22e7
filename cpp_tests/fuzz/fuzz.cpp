// Random cases against manual attention in fp64, until the time or the number of cases is up.
//
//   fuzz --backend cpu --seconds 30               cases with the seeds 1, 2, 3, ...
//   fuzz --backend machine --seed 123 --cases 1   one case again, as a failure prints it
//   fuzz --backend cpu --plant all                how many cases it takes to find each planted bug
//
// Options: --head-dims LOW-HIGH narrows what is drawn, --device sm_80 the models of the machine; on
// the CPU --device is an instruction set. --find ends at the first failure, successfully: a bug
// that is planted in the code is to be found.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "plants.h"
#include "target.h"

using namespace flashtile::test;

namespace {

struct Options {
  std::string backend = "cpu", device, plant;
  double seconds = 1e9;
  uint64_t cases = UINT64_MAX, seed = 1;
  int least_head_dim = 1, largest_head_dim = 256;
  bool find = false;
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

bool read_options(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--find") {
      options.find = true;
      continue;
    }
    ++i;
    if (i == argc || !read_option(options, key, argv[i])) {
      std::printf("unknown or incomplete option %s; fuzz.cpp says what there is\n", key.c_str());
      return false;
    }
  }
  return options.backend == "cpu" || options.backend == "machine";
}

Attempt run_case(const FuzzCase& c, const FuzzTarget& target, const Plant* plant) {
  return attempt_draws(c.seed, [&](uint64_t values_seed) {
    const Setup setup = c.setup(values_seed);
    AttentionInput input = manual_input(setup);
    if (plant != nullptr) plant->change(setup, input);
    return target.attempt(setup, Truth(setup, input), c.seed);
  });
}

std::string place(const Options& options) {
  return options.backend + (options.device.empty() ? "" : " " + options.device);
}

std::string reproducer(const Options& options, uint64_t seed) {
  std::string text =
      "fuzz --backend " + options.backend + " --seed " + std::to_string(seed) + " --cases 1";
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
Tally run_cases(const Options& options, const FuzzTarget& target, const Plant* plant, bool stop) {
  const double start = now();
  Tally tally;
  while (tally.cases < options.cases && tally.seconds < options.seconds) {
    const FuzzCase c = random_case(options.seed + tally.cases, target.range);
    std::string wrong;
    try {
      wrong = run_case(c, target, plant).wrong;
    } catch (const std::exception& error) {
      wrong = error.what();
    }
    ++tally.cases;
    tally.seconds = now() - start;
    if (wrong.empty()) continue;
    ++tally.failures;
    if (plant == nullptr && tally.failures <= 20) {
      std::printf("FAIL %s\n    %s %s\n", reproducer(options, c.seed).c_str(),
                  c.setup(c.seed).name().c_str(), wrong.c_str());
    }
    if (stop) break;
  }
  return tally;
}

// 0 when every planted bug was found.
int find_plants(const Options& options, const FuzzTarget& target) {
  int missed = 0;
  for (const Plant& plant : plants()) {
    if (options.plant != "all" && options.plant != plant.name) continue;
    const Tally tally = run_cases(options, target, &plant, /*stop=*/true);
    if (tally.failures > 0) {
      std::printf("planted %s on the %s: found by case %llu, after %.1f s\n", plant.name,
                  place(options).c_str(), static_cast<unsigned long long>(tally.cases),
                  tally.seconds);
    } else {
      std::printf("planted %s on the %s: NOT found in %llu cases\n", plant.name,
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
  if (!target.unavailable.empty()) {
    std::printf("SKIP fuzz on the %s: %s\n", place(options).c_str(), target.unavailable.c_str());
    return 77;
  }
  target.range.least_head_dim = options.least_head_dim;
  target.range.largest_head_dim = options.largest_head_dim;
  if (!options.plant.empty()) return find_plants(options, target);
  const Tally tally = run_cases(options, target, nullptr, options.find);
  std::printf("fuzz on the %s: %llu cases, seeds %llu to %llu, in %.0f s, %llu failed\n",
              place(options).c_str(), static_cast<unsigned long long>(tally.cases),
              static_cast<unsigned long long>(options.seed),
              static_cast<unsigned long long>(options.seed + tally.cases - 1), tally.seconds,
              static_cast<unsigned long long>(tally.failures));
  return (tally.failures == 0) == !options.find ? 0 : 1;
}
