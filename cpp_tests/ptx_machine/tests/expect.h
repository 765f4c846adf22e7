// A launch that must end in a report of one kind, or in none, under several schedules.
#pragma once

#include <algorithm>

#include "run.h"

namespace ptx_test {

// Where one hazard shows in several ways, depending on who came first, `kinds` names them all. The
// source line must be in a file whose name ends with `file`.
struct Expected {
  std::vector<ptx::Error> kinds;
  const char* mention = "";
  ptx::Device device = ptx::kSm90;
  int resident_blocks = 1;
  uint64_t budget = 20000;
  bool ordered_sums = false;
};

inline void check_report(const Expected& expected) {
  const std::vector<ptx::Report>& reports = ptx::machine().reports();
  CHECK_EQ(reports.size(), 1u);
  if (reports.size() != 1) return;
  const ptx::Report& report = reports.front();
  const auto& kinds = expected.kinds;
  CHECK_MESSAGE(std::find(kinds.begin(), kinds.end(), report.kind) != kinds.end(),
                report.to_string());
  CHECK_MESSAGE(report.to_string().find(expected.mention) != std::string::npos, report.to_string());
  CHECK_MESSAGE(report.line > 0, report.to_string());
}

template <class Launch>
void expect(const Expected& expected, Launch launch) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    ptx::Machine& machine = fresh_machine(seed, expected.device);
    machine.set_budget(expected.budget);
    machine.set_resident_blocks(expected.resident_blocks);
    machine.set_ordered_sums(expected.ordered_sums);
    launch();
    machine.set_ordered_sums(false);
    machine.set_resident_blocks(1);
    const bool failed = cudaGetLastError() != cudaSuccess;
    if (expected.kinds.empty()) {
      CHECK(!failed);
      check_clean();
      continue;
    }
    CHECK(failed);
    check_report(expected);
  }
}

}  // namespace ptx_test
