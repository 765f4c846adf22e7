// A call of the C API converts its problem once, plans once and asks the device once, whatever it
// is asked for. The linker puts the counters of this file in front of the library's own functions
// (--wrap in CMakeLists.txt).
#include "../support/check.h"
#include "kernel_cases.h"
#include "machine.h"
#include "untouched_call.h"

using namespace flashtile::test;

namespace {

struct Counts {
  int conversions = 0, plans = 0;
};
Counts counts;

}  // namespace

#define FLASHTILE_CONVERT \
  "_ZN9flashtile15convert_problemEPK17flashtile_problemRNS_6TargetERNS_7ProblemE"
#define FLASHTILE_CHOOSE_FORWARD \
  "_ZN9flashtile4cuda6chooseERKNS_13ForwardParamsERKNS_6ScoresERNS0_11DeviceScopeERNS_4PlanIS1_EE"
#define FLASHTILE_CHOOSE_BACKWARD                                                                 \
  "_ZN9flashtile4cuda6chooseERKNS_14BackwardParamsERKNS_6ScoresERNS0_11DeviceScopeERNS_4PlanIS1_" \
  "EE"

using ThreePointers = flashtile_status(const void*, void*, void*);
ThreePointers convert asm("__real_" FLASHTILE_CONVERT);
using FourPointers = flashtile_status(const void*, const void*, void*, void*);
FourPointers choose_forward asm("__real_" FLASHTILE_CHOOSE_FORWARD);
FourPointers choose_backward asm("__real_" FLASHTILE_CHOOSE_BACKWARD);
ThreePointers counted_convert asm("__wrap_" FLASHTILE_CONVERT);
FourPointers counted_forward asm("__wrap_" FLASHTILE_CHOOSE_FORWARD);
FourPointers counted_backward asm("__wrap_" FLASHTILE_CHOOSE_BACKWARD);

flashtile_status counted_convert(const void* user, void* target, void* problem) {
  ++counts.conversions;
  return convert(user, target, problem);
}
flashtile_status counted_forward(const void* params, const void* scores, void* scope, void* plan) {
  ++counts.plans;
  return choose_forward(params, scores, scope, plan);
}
flashtile_status counted_backward(const void* params, const void* scores, void* scope, void* plan) {
  ++counts.plans;
  return choose_backward(params, scores, scope, plan);
}

namespace {

// On every device: device_index names it or leaves it to the thread.
template <class F>
void check_once(const char* name, flashtile_problem& problem, F call) {
  ptx::Machine& machine = ptx::machine();
  for (const ptx::Device& device : {ptx::kSm80, ptx::kSm89, ptx::kSm90}) {
    for (const int32_t index : {-1, 0}) {
      machine.configure(device);
      machine.set_execution(false);
      machine.reset_counters();
      counts = {};
      problem.device_index = index;
      CHECK_EQ(call(), FLASHTILE_OK);
      machine.set_execution(true);
      const ptx::HostCalls calls = machine.host_calls();
      CHECK_MESSAGE(counts.conversions == 1 && counts.plans == 1,
                    std::string(name) + ": " + std::to_string(counts.conversions) +
                        " conversions, " + std::to_string(counts.plans) + " plans");
      CHECK_EQ(calls.current_devices, uint64_t{1});
      CHECK_EQ(calls.device_attributes, uint64_t{3});
      CHECK(calls.driver_versions <= 1);
    }
  }
}

}  // namespace

TEST("a forward's questions and its run") {
  Call call;
  call.problem.window_right = 0;  // no question for the number of multiprocessors
  char text[256];
  size_t bytes = 0;
  check_once("can_run", call.problem,
             [&] { return flashtile_can_run(&call.params, text, sizeof text); });
  check_once("plan", call.problem, [&] { return flashtile_plan(&call.params, text, sizeof text); });
  check_once("workspace_size", call.problem,
             [&] { return flashtile_workspace_size(&call.params, &bytes); });
  check_once("forward", call.problem, [&] { return flashtile_forward(&call.params, nullptr); });
}
TEST("a backward's questions and its run") {
  BackwardCall call;
  char text[256];
  size_t bytes = 0;
  check_once("can_run_backward", call.problem,
             [&] { return flashtile_can_run_backward(&call.params, text, sizeof text); });
  check_once("plan_backward", call.problem,
             [&] { return flashtile_plan_backward(&call.params, text, sizeof text); });
  check_once("workspace_size_backward", call.problem,
             [&] { return flashtile_workspace_size_backward(&call.params, &bytes); });
  ptx::machine().configure(ptx::kSm90);  // which asks for the largest workspace
  call.with_workspace();
  call.params.workspace_bytes += size_t{1} << 20;
  check_once("backward", call.problem, [&] { return flashtile_backward(&call.params, nullptr); });
}
