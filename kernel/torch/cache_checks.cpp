#include "cache_checks.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace flashtile::ops {
namespace {

// The reports that devices write, by device index. Never freed: a launch may still write.
struct Reports {
  std::mutex mutex;
  std::map<int32_t, flashtile_cache_report*> of_device;
};
Reports& reports() {
  static auto* const all = new Reports;
  return *all;
}

flashtile_cache_report* new_report() {
  constexpr int64_t kWords = sizeof(flashtile_cache_report) / sizeof(int64_t);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto* const memory = new Tensor(
      torch::stable::full({kWords}, 0.0, ScalarType::Long, std::nullopt, cpu, /*pin_memory=*/true));
  return static_cast<flashtile_cache_report*>(memory->mutable_data_ptr());
}

// The sentence in the words of the ops.
std::string sentence_of(const flashtile_cache_report& report) {
  char text[256] = "";
  flashtile_describe_report(&report, text, sizeof text);
  return in_words_of_op(text, kCacheNames);
}

// The caller holds the mutex. `what` tells that the rest is there.
void raise_reported(flashtile_cache_report& report) {
  if (__atomic_load_n(&report.what, __ATOMIC_ACQUIRE) <= 0) return;
  const flashtile_cache_report found = report;
  __atomic_store_n(&report.what, 0, __ATOMIC_RELEASE);
  raise_unless_empty("an earlier call found: " + sentence_of(found));
}

}  // namespace

bool is_checked(bool check) {
  if (check) return true;
  const char* const value = std::getenv("FLASHTILE_CHECK");
  return value != nullptr && std::string(value) == "1";
}

std::string numbers_refusal(const flashtile_problem& problem) {
  flashtile_cache_report report = {};
  if (flashtile_check_cache(&problem, &report, nullptr) != FLASHTILE_OK)
    return in_words_of_op(flashtile_last_error(), kCacheNames);
  return report.what == 0 ? std::string() : sentence_of(report);
}

void check_numbers(const flashtile_problem& problem, CUstream_st* stream) {
  if (problem.device == FLASHTILE_CPU) {
    raise_unless_empty(numbers_refusal(problem));
    return;
  }
  const std::lock_guard lock(reports().mutex);
  flashtile_cache_report*& report = reports().of_device[problem.device_index];
  if (report == nullptr) report = new_report();
  raise_reported(*report);
  raise_unless_ok(flashtile_check_cache(&problem, report, stream), kCacheNames);
}

void raise_pending_checks() {
  const std::lock_guard lock(reports().mutex);
  for (const auto& [device, report] : reports().of_device) raise_reported(*report);
}

}  // namespace flashtile::ops
