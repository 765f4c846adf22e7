// What a call asks of runtime and driver on compute capability 9.0, counted while nothing runs:
// every tensor map once, what the device and the driver are once, nothing allocated, copied or
// waited for.
#include "../support/check.h"
#include "kernel_cases.h"
#include "machine.h"
#include "untouched_call.h"

using namespace flashtile::test;

namespace {

struct Counted {
  ptx::HostCalls calls;
  uint64_t tensor_maps;
};

// The second of two calls: what is found once in a process has been found.
template <class F>
Counted count(F call) {
  ptx::Machine& machine = ptx::machine();
  machine.configure(ptx::kSm90);
  machine.set_execution(false);
  for (int round = 0; round < 2; ++round) {
    machine.reset_counters();
    CHECK_EQ(call(), FLASHTILE_OK);
  }
  machine.set_execution(true);
  return {machine.host_calls(), machine.counters().tensor_maps};
}

Counted count_forward(const flashtile_forward_params& params) {
  return count([&] { return flashtile_forward(&params, nullptr); });
}

Counted count_backward(BackwardCall& call) {
  call.with_workspace();
  return count([&] { return flashtile_backward(&call.params, nullptr); });
}

bool has_sm90() {
  for (const Schedule& schedule : schedules()) {
    if (schedule.has_sm90) return true;
  }
  return false;
}

void check_common(const Counted& counted, uint64_t launches) {
  CHECK_EQ(counted.calls.launches, launches);
  CHECK_EQ(counted.tensor_maps, uint64_t{4});
  CHECK_EQ(counted.calls.entry_points, uint64_t{0});
  CHECK_EQ(counted.calls.driver_versions, uint64_t{1});
  CHECK_EQ(counted.calls.function_attributes, uint64_t{1});
  CHECK_EQ(counted.calls.others, uint64_t{0});
}

}  // namespace

TEST("a forward encodes four tensor maps and launches once") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  Call call;
  call.problem.window_right = 0;  // the hardware deals out the tiles
  const Counted causal = count_forward(call.params);
  check_common(causal, 1);
  CHECK_EQ(causal.calls.device_attributes, uint64_t{3});
  CHECK_EQ(causal.calls.current_devices, uint64_t{1});
  call.problem.window_right = FLASHTILE_UNLIMITED;  // a block on each multiprocessor
  const Counted full = count_forward(call.params);
  check_common(full, 1);
  CHECK_EQ(full.calls.device_attributes, uint64_t{4});
  CHECK_EQ(full.calls.current_devices, uint64_t{1});
}
TEST("a backward encodes four tensor maps and launches three times") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  for (const uint32_t flags : {0u, static_cast<uint32_t>(FLASHTILE_DETERMINISTIC)}) {
    BackwardCall call;
    call.problem.flags = flags;
    const Counted counted = count_backward(call);
    check_common(counted, 3);
    CHECK_EQ(counted.calls.device_attributes, uint64_t{3});
    CHECK_EQ(counted.calls.current_devices, uint64_t{1});
  }
}
TEST("the driver's function is looked up once in a process") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  ptx::machine().configure(ptx::kSm90);
  ptx::machine().reset_counters();
  Call call;
  for (int i = 0; i < 3; ++i) CHECK_EQ(flashtile_can_run(&call.params, nullptr, 0), FLASHTILE_OK);
  CHECK(ptx::machine().host_calls().entry_points <= 1);
  CHECK_EQ(ptx::machine().host_calls().launches, uint64_t{0});
  CHECK_EQ(ptx::machine().counters().tensor_maps, uint64_t{0});
}
TEST("a refused call asks nothing that could wait") {
  ptx::machine().configure(ptx::kSm90);
  ptx::machine().reset_counters();
  Call call;
  call.problem.head_dim = 300;
  CHECK(flashtile_forward(&call.params, nullptr) != FLASHTILE_OK);
  CHECK_EQ(ptx::machine().host_calls().launches, uint64_t{0});
  CHECK_EQ(ptx::machine().host_calls().others, uint64_t{0});
}
