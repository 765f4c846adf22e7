// Cells of score_matrix.h on the machine, each on the device model and in the dtype that its index
// says: those of every option with every other level and head dims of the slice of 64; in make
// test-nightly all cells there, and the others on every device model and in the slices of 128 and
// 256, too.
#include "../support/score_matrix.h"
#include "../support/check.h"
#include "../support/score_matrix_report.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

constexpr const char* kDeviceOfReport = "machine, scores";

struct Place {
  const std::vector<Schedule>& schedules;  // of one device
  const Backend& backend;
};

void run_cell(const Cell& cell, const Place& place, ErrorTable& table, MatrixReport& report) {
  const auto make = [&](uint64_t seed) {
    return make_setup(cell.spec, cell.dtype, cell.head_dims, cell.mask, seed);
  };
  const uint64_t first_seed = static_cast<uint64_t>(cell.index) + 1;
  const Setup setup = make(first_seed);
  const std::string device = place.schedules.front().device;
  Run::Refusals said;
  if (!expected_score_refusals(cell).backward.empty()) {
    begin(place.schedules.front());
    said = Run(setup, place.backend).refusals();
    CHECK_EQ(finish(), std::string());
  }
  const auto attempt = [&] {
    const std::vector<Schedule> chosen =
        schedules_of_case(place.schedules, first_seed, cell.spec.deterministic);
    const Attempt result = attempt_draws(first_seed, [&](uint64_t seed) {
      const Setup drawn = make(seed);
      return attempt_on_device(chosen, drawn, Truth(drawn), place.backend);
    });
    for (const Verdict& verdict : result.verdicts) table.add(device, setup, verdict);
    return result;
  };
  report_score_cell(cell, setup.name() + " on " + device, said, attempt, report);
}

// The cells whose index is `shard` modulo `shards`.
void run_shard(int shard, int shards) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  std::vector<std::vector<Schedule>> devices;
  for (const auto& device : schedules_by_device()) devices.push_back(device.second);
  ErrorTable table;
  MatrixReport report(kDeviceOfReport);
  for (const Cell& cell : score_matrix()) {
    if (cell.index % shards != shard || (!cell.in_pairs && !is_nightly())) continue;
    const size_t own = static_cast<size_t>(cell.index / 2) % devices.size();
    const bool everywhere = cell.in_pairs && is_nightly();
    for (size_t d = 0; d < devices.size(); ++d) {
      if (!everywhere && d != own) continue;
      for (const int factor : {1, 2, 4}) {
        const Cell chosen = on_cuda(cell, factor);
        if ((factor > 1 && !everywhere) || slice_of(chosen.head_dims) == 0) continue;
        run_cell(chosen, {devices[d], backend}, table, report);
      }
    }
  }
  table.print();
  report.print();
}

}  // namespace

TEST("scores 1 of 2") { run_shard(0, 2); }
TEST("scores 2 of 2") { run_shard(1, 2); }
