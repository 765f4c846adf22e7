// flashtile_check_cache on CUDA: the report that the CPU writes, whatever is wrong and wherever.
#include <cstring>
#include <random>

#include "../support/append_case.h"
#include "../support/check.h"
#include "device.h"

using namespace flashtile::test;

namespace {

constexpr int kSequences = 70;  // more than the kernel has warps

CacheSpec many_sequences(bool paged) {
  CacheSpec spec = {.page_size = paged ? 3 : 0, .batch_idx = true, .packed = true};
  for (int b = 0; b < kSequences; ++b) {
    spec.sequences.push_back({.seed = 1,
                              .keys = b % 5 == 0 ? 130 : b,  // more columns than a warp has lanes
                              .queries = b % 3,
                              .leftpad = b % 4,
                              .added = b % 3});
  }
  return spec;
}

flashtile_cache_report check_on(const Backend& backend, const CacheCall& call,
                                const flashtile_problem& host_problem,
                                flashtile_cache_report report = {}) {
  Mirror mirror(backend);
  const flashtile_problem problem = mirrored(mirror, backend, call, host_problem);
  const DeviceBytes memory(backend, &report, sizeof report);
  auto* const written = reinterpret_cast<flashtile_cache_report*>(memory.data());
  CHECK_EQ(flashtile_check_cache(&problem, written, nullptr), FLASHTILE_OK);
  memory.copy_out(&report);
  return report;
}

std::string sentence_of(const flashtile_cache_report& report) {
  char text[128] = "";
  CHECK_EQ(flashtile_describe_report(&report, text, sizeof text),
           report.what == 0 ? FLASHTILE_OK : FLASHTILE_INVALID_ARGUMENT);
  return text;
}

}  // namespace

TEST("the first wrong number of the first sequence that has one, as on the CPU") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  const Backend backend = cuda_backend();
  const std::vector<Schedule> all = schedules();
  std::mt19937 random(3);
  size_t silent = 0;
  for (size_t round = 0; round < 80; ++round) {
    CacheCall call(many_sequences(round % 4 != 0));
    const flashtile_problem problem = call.problem();
    const auto spoil = [&](std::vector<int32_t>& numbers) {
      constexpr int32_t kWrong[] = {-1, INT32_MAX, INT32_MIN, 100000};
      numbers[random() % numbers.size()] = kWrong[random() % 4];
    };
    std::vector<int32_t>* const arrays[] = {&call.lengths, &call.leftpads,  &call.table,
                                            &call.cu_q,    &call.batch_idx, &call.cu_new};
    for (size_t i = 0; i < round % 4; ++i) spoil(*arrays[random() % 6]);
    begin(all[round % all.size()]);
    const flashtile_cache_report expected = check_on(cpu_backend(), call, problem);
    const flashtile_cache_report report = check_on(backend, call, problem);
    CHECK_EQ(finish(), std::string());
    CHECK_EQ(sentence_of(report), sentence_of(expected));
    CHECK(std::memcmp(&report, &expected, sizeof report) == 0);
    silent += report.what == 0 ? 1 : 0;
  }
  CHECK(silent > 10 && silent < 60);
}

TEST("what is reported already stays, and so does a report in work") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  const Backend backend = cuda_backend();
  begin(schedules().front());
  CacheCall call(many_sequences(true));
  call.lengths[5] = -1;
  for (const int32_t what : {3, -1}) {
    const flashtile_cache_report before = {what, 0, 9, 9, 77, 0, 64};
    const flashtile_cache_report after = check_on(backend, call, call.problem(), before);
    CHECK(std::memcmp(&before, &after, sizeof before) == 0);
  }
  CHECK_EQ(finish(), std::string());
}
