// What decoding over a cache moves, counted by the machine: every row in use once per sequence and
// key/value head, whatever the pages; little for the partial results; no bank conflict.
#include <cstdio>

#include "../support/check.h"
#include "cache_on_device.h"
#include "machine.h"

using namespace flashtile::test;

namespace {

struct Counted {
  ptx::Counters all;
  CacheSpec spec;
};

Counted count(const CacheSpec& spec, const Schedule& schedule) {
  CacheCall call(spec);
  const CacheResult result = run_under(schedule, call, call.problem());
  CHECK_EQ(result.error, std::string());
  return {ptx::machine().counters(), spec};
}

std::vector<Schedule> a_schedule_of_each() {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  std::vector<Schedule> chosen;
  for (const auto& [device, its_schedules] : schedules_by_device()) {
    chosen.push_back(its_schedules.front());
  }
  return chosen;
}

// Two key/value heads, each with 4 packed rows for every query.
constexpr int kGroup = 4;
CacheSpec one_sequence(int keys, int dim, int page_size, int queries = 1) {
  return {.dtype = Dtype::kBFloat16,
          .heads = 2 * kGroup,
          .heads_kv = 2,
          .dims = dim,
          .sequences = {{.seed = 1, .keys = keys, .queries = queries}},
          .page_size = page_size,
          .num_splits = 1,
          .layout_k = Layout::kDense,
          .layout_v = Layout::kDense};
}

// Calls of 4, 16, 24, 48 and 64 packed rows: both forms, with and without idle warps.
template <class Check>
void for_every_page_size(const Check& check) {
  for (const Schedule& schedule : a_schedule_of_each()) {
    for (const int dim : {32, 64, 96, 128, 192, 256}) {
      if (slice_of(dim) == 0) continue;
      for (const int page_size : {0, 1, 7, 16, 48, 128, 256}) {
        for (const int rows : {4, 16, 24, 48, 64})
          check(schedule, one_sequence(500, dim, page_size, rows / kGroup));
      }
    }
  }
}

// A line of a table: what 192 keys and values of two heads of 128 cost few and many packed rows;
// page size 0 is contiguous.
void print_row(const Schedule& schedule, const CacheSpec& spec, uint64_t read) {
  const int packed = spec.sequences[0].queries * kGroup;
  if (spec.dims.qk != 128 || (packed != 4 && packed != 64)) return;
  const uint64_t rows = uint64_t{192} * 2 * 2 * 2 * 128;
  std::printf("%s, pages of %3d, %2d rows: %llu bytes read for %llu of keys and values\n",
              schedule.device.c_str(), static_cast<int>(spec.page_size), packed,
              static_cast<unsigned long long>(read), static_cast<unsigned long long>(rows));
}

}  // namespace

// Two calls that differ by 192 keys and nothing else: 192 rows of K and of V for each head, and of
// the table 4 bytes a row.
TEST("keys and values are read once, whatever the packed rows, and the table once a row") {
  for_every_page_size([](const Schedule& schedule, CacheSpec spec) {
    spec.sequences[0].keys = 77;
    const Counted few = count(spec, schedule);
    spec.sequences[0].keys += 192;
    const Counted many = count(spec, schedule);
    const uint64_t table = spec.page_size == 0 ? 0 : sizeof(int32_t);
    const uint64_t row = 2 * 2 * static_cast<uint64_t>(spec.dims.qk) + table;
    const uint64_t read = many.all.global_read_bytes - few.all.global_read_bytes;
    CHECK_MESSAGE(read == 192 * 2 * row, spec.name() + ": " + std::to_string(read) + " bytes");
    CHECK_EQ(many.all.global_written_bytes, few.all.global_written_bytes);
    print_row(schedule, spec, read);
  });
}

TEST("no bank conflicts, no local memory, whole sectors") {
  for_every_page_size([](const Schedule& schedule, const CacheSpec& spec) {
    const Counted counted = count(spec, schedule);
    CHECK_EQ(counted.all.wavefronts, counted.all.wavefronts_ideal);
    CHECK_EQ(counted.all.local_accesses, uint64_t{0});
    CHECK_MESSAGE(counted.all.sectors * 100 <= counted.all.sectors_ideal * 110,
                  counted.spec.name() + ": " + std::to_string(counted.all.sectors) + " sectors, " +
                      std::to_string(counted.all.sectors_ideal) + " ideal");
    CHECK(counted.all.shared_bytes_max <= static_cast<uint64_t>(schedule.shared_memory));
  });
}

// Keys outside of a window are not read.
TEST("reading is proportional to what is visible") {
  for (const Schedule& schedule : a_schedule_of_each()) {
    if (slice_of(64) == 0) SKIP("this build has no kernels of head dim 64");
    CacheSpec spec = one_sequence(2000, 64, 16);
    const uint64_t all = count(spec, schedule).all.global_read_bytes;
    spec.mask = {100, 0};
    CHECK(count(spec, schedule).all.global_read_bytes * 10 < all);
  }
}

// What is written beside out and softmax_lse are the partial results, which are read once.
TEST("partial results are at most 5 % of 16384 keys and values") {
  for (const Schedule& schedule : a_schedule_of_each()) {
    if (slice_of(64) == 0) SKIP("this build has no kernels of head dim 64");
    for (const int heads : {8, 32}) {
      CacheSpec spec = one_sequence(16384, 64, 16);
      spec.heads = heads;
      spec.num_splits = 0;
      const uint64_t written = count(spec, schedule).all.global_written_bytes;
      const uint64_t rows = static_cast<uint64_t>(heads);
      const uint64_t partial = written - rows * (2 * 64 + sizeof(float));
      CHECK_EQ(partial, rows * 16 * (64 + 2) * sizeof(float));
      CHECK(2 * partial * 100 <= uint64_t{16384} * 2 * 2 * 64 * 2 * 5);
    }
  }
}
