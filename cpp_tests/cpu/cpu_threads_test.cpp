// Calls from two threads at once: a process's first ones; and each appends to a cache of its own
// and reads it, and both read a third one. `ctest --preset tsan` runs this under ThreadSanitizer.
#include <array>
#include <barrier>
#include <thread>

#include "../support/attempt.h"
#include "../support/cache_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

constexpr int kRounds = 5;

CacheSpec spec_of(uint64_t seed) {
  return {.dtype = Dtype::kBFloat16,
          .heads = 4,
          .heads_kv = 2,
          .dims = 32,
          .sequences = {{.seed = seed, .keys = 70, .queries = 2, .added = 2},
                        {.seed = seed + 1, .keys = 0, .queries = 24, .added = 24}},
          .page_size = 16,
          .packed = true,
          .layout_seed = seed};
}

// What one thread does and finds.
struct Work {
  CacheSpec spec;
  CacheCall& shared;
  std::vector<double> own_out = {}, shared_out = {};
  std::string error = {};

  void operator()() {
    for (int round = 0; round < kRounds; ++round) {
      CacheCall own(spec);
      error += own.append();
      flashtile_cache_report report = {};
      const flashtile_problem problem = own.problem();
      if (flashtile_check_cache(&problem, &report, nullptr) != FLASHTILE_OK || report.what != 0)
        error += "wrong numbers";
      const CacheResult own_result = own.run(), shared_result = shared.run();
      error += own_result.error + shared_result.error;
      own_out = own_result.out;
      shared_out = shared_result.out;
    }
  }
};

// Forward, backward, an append and attention over the cache.
struct Calls {
  Setup setup;
  CacheCall cache;
  RunResult run = {};
  CacheResult attended = {};
  std::string error = {};

  void operator()() {
    const Backend backend = cpu_backend();
    run = Run(setup, backend)();
    error = run.error + cache.append();
    attended = cache.run();
    error += attended.error;
  }
};

Calls calls_of(uint64_t seed) {
  const Case spec = {.name = "first calls",
                     .heads = 4,
                     .heads_kv = 2,
                     .seqlen_q = 40,
                     .seqlen_k = 70,
                     .deterministic = true};
  return {make_setup(spec, Dtype::kBFloat16, 32, kCausal, seed), CacheCall(spec_of(seed))};
}

}  // namespace

// A test is a process: nothing has been called before.
TEST("G4 the first calls of a process, from two threads at the same time") {
  std::array<Calls, 2> together = {calls_of(1), calls_of(50)};
  std::barrier start(2);
  const auto run = [&](size_t thread) {
    start.arrive_and_wait();
    together[thread]();
  };
  std::thread first(run, 0), second(run, 1);
  first.join();
  second.join();
  std::array<Calls, 2> alone = {calls_of(1), calls_of(50)};
  for (size_t i = 0; i < 2; ++i) {
    alone[i]();
    CHECK_EQ(together[i].error + alone[i].error, std::string());
    CHECK(identical(together[i].run.values, alone[i].run.values));
    CHECK(together[i].attended.out == alone[i].attended.out);
  }
  CHECK(alone[0].attended.out != alone[1].attended.out);
}

TEST("two threads append and read, each its own cache and both a third") {
  CacheCall shared(spec_of(100));
  CHECK_EQ(shared.append(), std::string());
  std::array<Work, 2> alone = {Work{spec_of(1), shared}, Work{spec_of(50), shared}};
  for (Work& work : alone) work();
  std::array<Work, 2> together = {Work{spec_of(1), shared}, Work{spec_of(50), shared}};
  std::thread first(std::ref(together[0])), second(std::ref(together[1]));
  first.join();
  second.join();
  for (size_t i = 0; i < 2; ++i) {
    CHECK_EQ(together[i].error, std::string());
    CHECK(together[i].own_out == alone[i].own_out);
    CHECK(together[i].shared_out == alone[i].shared_out);
  }
  CHECK(alone[0].own_out != alone[1].own_out);
}
