// Every row of matrix.h on the device models: out, LSE, dq, dk, dv against manual attention
// in fp64, or a refusal with the stated sentence. Deterministic rows run under two schedules.
#include "../support/matrix.h"
#include "../support/check.h"
#include "../support/matrix_report.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

struct Device {
  std::vector<Schedule> schedules;
  MatrixReport report;
};

void check_refusal(const Cell& cell, const std::string& reason, const Backend& backend,
                   std::vector<Device>& devices) {
  const Setup setup = make_setup(cell.spec, cell.dtype, cell.head_dims, cell.mask);
  for (Device& device : devices) {
    begin(device.schedules.front());
    const Run::Refusals said = Run(setup, backend).refusals();
    CHECK_EQ(finish(), std::string());
    const auto check = [&](const char* pass, const std::string& sentence) {
      const std::string where = device.schedules.front().device + ", " + pass;
      CHECK_MESSAGE(sentence == reason, setup.name() + " on " + where + ": \"" + sentence +
                                            "\", not \"" + reason + '"');
      device.report.add(cell, pass, sentence == reason ? Outcome::kRefused : Outcome::kFailed,
                        sentence);
    };
    check("forward", said.forward);
    check("backward", said.backward);
  }
}

void check_results(const Cell& cell, const Backend& backend, std::vector<Device>& devices,
                   ErrorTable& table) {
  const auto setup_of = [&](uint64_t seed) {
    return make_setup(cell.spec, cell.dtype, cell.head_dims, cell.mask, seed);
  };
  const uint64_t first_seed = static_cast<uint64_t>(cell.index) + 1;
  const Setup setup = setup_of(first_seed);
  const Truth truth(setup);
  for (Device& device : devices) {
    const std::vector<Schedule> chosen =
        schedules_of_case(device.schedules, first_seed, cell.spec.deterministic);
    const Attempt attempt = attempt_draws(first_seed, [&](uint64_t seed) {
      if (seed == first_seed) return attempt_on_device(chosen, setup, truth, backend);
      const Setup other = setup_of(seed);
      return attempt_on_device(chosen, other, Truth(other), backend);
    });
    for (const Verdict& verdict : attempt.verdicts)
      table.add(chosen.front().device, setup, verdict);
    CHECK_MESSAGE(attempt.passed(), attempt.wrong);
    device.report.add(cell, "forward",
                      attempt.forward_passed() ? Outcome::kPassed : Outcome::kFailed);
    device.report.add(cell, "backward", attempt.passed() ? Outcome::kPassed : Outcome::kFailed);
  }
}

// The cells whose index is `shard` modulo `shards`.
void run_shard(int shard, int shards) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  const Backend backend = cuda_backend();
  std::vector<Device> devices;
  for (const auto& [name, its] : schedules_by_device())
    devices.push_back({its, MatrixReport(name)});
  ErrorTable table;
  for (const Cell& cell : matrix()) {
    if (cell.index % shards != shard) continue;
    const std::string refusal = expected_refusal(cell, /*on_cuda=*/true);
    if (refusal.empty()) {
      check_results(cell, backend, devices, table);
    } else {
      check_refusal(cell, refusal, backend, devices);
    }
  }
  table.print();
  for (const Device& device : devices) device.report.print();
}

}  // namespace

TEST("matrix 1 of 4") { run_shard(0, 4); }
TEST("matrix 2 of 4") { run_shard(1, 4); }
TEST("matrix 3 of 4") { run_shard(2, 4); }
TEST("matrix 4 of 4") { run_shard(3, 4); }
