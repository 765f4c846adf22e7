// Prints what a call costs the host on compute capability 9.0: its calls of runtime and driver, and
// the time of everything else, with stubs that answer at once and launch nothing. A benchmark and
// no test: what the real runtime and driver add depends on them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "machine.h"
#include "untouched_call.h"

using namespace flashtile::test;

namespace {

constexpr int kCalls = 2000, kRounds = 15;

using Function = std::function<flashtile_status()>;

// The best of some rounds: whatever disturbs only adds.
double microseconds(const Function& call) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
      if (call() != FLASHTILE_OK) return -1;
    }
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    best = std::min(best, time.count() / kCalls);
  }
  return best;
}

void print(const char* name, const Function& call) {
  ptx::machine().reset_counters();
  if (call() != FLASHTILE_OK) {
    std::printf("%-24s %s\n", name, flashtile_last_error());
    return;
  }
  const ptx::HostCalls calls = ptx::machine().host_calls();
  const uint64_t encodes = ptx::machine().counters().tensor_maps;
  const auto n = [](uint64_t x) { return static_cast<unsigned long long>(x); };
  std::printf("%-24s %8llu %7llu %9llu %7llu %8llu %7.2f\n", name, n(calls.launches), n(encodes),
              n(calls.function_attributes), n(calls.device_attributes),
              n(calls.current_devices + calls.driver_versions), microseconds(call));
}

}  // namespace

int main() {
  ptx::machine().configure(ptx::kSm90);
  ptx::machine().set_execution(false);
  std::printf("%-24s %8s %7s %9s %7s %8s %7s\n", "call", "launches", "encodes", "func attr",
              "queries", "versions", "us");
  Call full, causal, unaligned;
  causal.problem.window_right = 0;
  unaligned.params.k.stride_seq += 1;
  const auto forward = [](const Call& call) {
    return [&call] { return flashtile_forward(&call.params, nullptr); };
  };
  print("forward", forward(full));
  print("forward causal", forward(causal));
  print("forward by mma.sync", forward(unaligned));
  BackwardCall plain, ordered;
  ordered.problem.flags |= FLASHTILE_DETERMINISTIC;
  for (BackwardCall* call : {&plain, &ordered}) {
    call->with_workspace();
    print(call == &plain ? "backward" : "backward deterministic",
          [call] { return flashtile_backward(&call->params, nullptr); });
  }
  return 0;
}
