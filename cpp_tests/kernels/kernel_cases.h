// Runs cases through the compiled CUDA kernels under every schedule and checks everything about
// them: values, NaN, gaps, the device's reports, and that the kernel we think of is the one that
// ran.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../check.h"
#include "../compare.h"
#include "../error_table.h"
#include "../runner.h"
#include "device.h"

namespace flashtile::test {

inline std::string expected_plan(const char* pass, const Setup& setup, const Schedule& schedule) {
  return std::string(pass) + "_sm80_" + memory_class(schedule) + "_d" +
         std::to_string(setup.head_dim) + "_" + name_of(setup.dtype) + "_" +
         (setup.causal ? "causal" : "full");
}

// Bitwise, so that NaN equals NaN.
inline bool identical(const AttentionOutput& a, const AttentionOutput& b) {
  const auto same = [](const std::vector<double>& x, const std::vector<double>& y) {
    return x.size() == y.size() &&
           (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0);
  };
  return same(a.out, b.out) && same(a.lse, b.lse) && same(a.dq, b.dq) && same(a.dk, b.dk) &&
         same(a.dv, b.dv);
}

// The kernels move 16 bytes at a time, and say so.
inline void expect_refused(const Setup& setup, const Backend& backend) {
  begin(schedules().front());
  const RunResult result = Run(setup, backend)();
  CHECK_MESSAGE(result.error.find("a multiple of") != std::string::npos,
                setup.name() + ": " + result.error);
}

inline void run_case(const Setup& setup, const Truth& truth, const Backend& backend,
                     ErrorTable& table) {
  std::map<std::string, AttentionOutput> first;  // of each device
  for (const Schedule& schedule : schedules()) {
    const std::string where =
        setup.name() + " on " + schedule.device + ", seed " + std::to_string(schedule.seed);
    begin(schedule);
    const RunResult result = Run(setup, backend)();
    const std::string reported = finish();
    CHECK_MESSAGE(reported.empty(), where + ": " + reported);
    CHECK_MESSAGE(result.error.empty(), where + ": " + result.error);
    if (!reported.empty() || !result.error.empty()) return;
    CHECK_EQ(result.forward_plan, expected_plan("forward", setup, schedule));
    if (!setup.forward_only())
      CHECK_EQ(result.backward_plan, expected_plan("backward", setup, schedule));
    const Verdict verdict = compare(setup, truth, result.values);
    CHECK_MESSAGE(verdict.passed(), where + verdict.text());
    const auto [same, is_first] = first.emplace(schedule.device, result.values);
    if (setup.spec.deterministic && !is_first) {
      CHECK_MESSAGE(identical(same->second, result.values),
                    where + ": not the bits of the first schedule");
    }
    table.add(schedule.device, setup.dtype, setup.head_dim, verdict, setup.forward_only());
  }
}

inline bool has_head_dim(int head_dim) {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_OK);
  return ("," + std::string(info.cuda_head_dims) + ",")
             .find("," + std::to_string(head_dim) + ",") != std::string::npos;
}

inline void run_cases(const std::vector<Case>& cases, Dtype dtype, int head_dim) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (!has_head_dim(head_dim)) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  ErrorTable table;
  uint64_t seed = 1;
  for (const Case& spec : cases) {
    for (const bool causal : {false, true}) {
      if (!spec.has(causal)) continue;
      const Setup setup = make_setup(spec, dtype, head_dim, causal, seed++);
      if (spec.layout == Layout::kOdd) {
        expect_refused(setup, backend);
      } else {
        run_case(setup, Truth(setup), backend, table);
      }
    }
  }
  table.print();
}

}  // namespace flashtile::test
