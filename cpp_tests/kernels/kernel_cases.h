// Runs cases through the compiled CUDA kernels under every schedule and checks everything about
// them: values, NaN, gaps, the device's reports, and that the kernel we think of is the one that
// ran.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "../check.h"
#include "../compare.h"
#include "../error_table.h"
#include "../runner.h"
#include "device.h"

namespace flashtile::test {

// The slice of this build that serves a pass: the smallest that holds q, k and v; 0 where none
// does. The backward has no slice 96; 128 takes its place.
inline int slice_of(const std::string& pass, const HeadDims& head_dims) {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_OK);
  std::stringstream built(info.cuda_head_dims);  // "64,128"
  int smallest = 0;
  for (std::string entry; std::getline(built, entry, ',');) {
    int slice = std::stoi(entry);
    if (pass == "backward" && slice == 96) slice = 128;
    const bool holds = slice >= std::max(head_dims.qk, head_dims.v);
    if (holds && (smallest == 0 || slice < smallest)) smallest = slice;
  }
  return smallest;
}

inline std::string expected_plan(const std::string& pass, const Setup& setup,
                                 const Schedule& schedule) {
  const int slice = slice_of(pass, {setup.head_dim, setup.head_dim_v});
  return pass + "_sm80_" + memory_class(schedule) + "_d" + std::to_string(slice) + "_" +
         name_of(setup.dtype) + "_" + kind_of(setup.mask);
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

// Every case under each of its masks, with these head dims.
inline void run_cases(const std::vector<Case>& cases, Dtype dtype, const HeadDims& head_dims) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (slice_of("forward", head_dims) == 0) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  ErrorTable table;
  uint64_t seed = 1;
  for (const Case& spec : cases) {
    for (const Mask& mask : spec.masks) {
      const Setup setup = make_setup(spec, dtype, head_dims, mask, seed++);
      run_case(setup, Truth(setup), backend, table);
    }
  }
  table.print();
}

}  // namespace flashtile::test
