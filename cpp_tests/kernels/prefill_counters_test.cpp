// What prefill over a cache moves on sm_90a, counted by the machine: every block of keys once for
// each tile of queries, whatever the pages, and an entry of the table for each piece of a page.
#include <cstdio>
#include <numeric>

#include "../support/check.h"
#include "cache_on_device.h"
#include "machine.h"

using namespace flashtile::test;

namespace {

constexpr uint64_t kHeads = 2;

int keys_per_block(int dim) { return dim <= 128 ? 128 : dim == 192 ? 112 : 80; }

// One tile of queries for each head, and whole blocks of keys.
ptx::Counters count(int dim, int page_size, int blocks, const Schedule& schedule) {
  CacheCall call({.dtype = Dtype::kBFloat16,
                  .heads = kHeads,
                  .heads_kv = 1,
                  .dims = dim,
                  .sequences = {{.seed = 1, .keys = blocks * keys_per_block(dim), .queries = 70}},
                  .page_size = page_size,
                  .mask = kFull,
                  .layout_k = Layout::kDense,
                  .layout_v = Layout::kDense});
  const CacheResult result = run_under(schedule, call, call.problem());
  CHECK_EQ(result.error, std::string());
  CHECK_EQ(result.plan, expected_cache_plan(call, schedule));
  return ptx::machine().counters();
}

template <class Check>
void for_every_page_size(const Check& check) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  bool has_sm90 = false;
  for (const auto& [device, its_schedules] : schedules_by_device()) {
    const Schedule& schedule = its_schedules.front();
    if (!schedule.has_sm90) continue;
    has_sm90 = true;
    for (const int dim : {64, 96, 128, 192, 256}) {
      if (slice_of(dim) != dim) continue;
      for (const int page_size : {0, 1, 7, 8, 16, 48, 64, 128, 256})
        check(schedule, dim, page_size);
    }
  }
  if (!has_sm90) SKIP("this build has no kernels for sm_90a");
}

}  // namespace

// Two calls that differ by a block of keys and nothing else.
TEST("sm_90a: a block of K and V is loaded once for every page size") {
  for_every_page_size([](const Schedule& schedule, int dim, int page_size) {
    const ptx::Counters few = count(dim, page_size, 2, schedule);
    const ptx::Counters many = count(dim, page_size, 3, schedule);
    const int block = keys_per_block(dim);
    const bool by_tma = page_size % 8 == 0;
    const auto pieces = static_cast<uint64_t>(page_size == 0 ? 0
                                              : by_tma       ? block / std::gcd(block, page_size)
                                                             : block);
    const uint64_t rows = kHeads * 2 * 2 * static_cast<uint64_t>(block * dim);
    const uint64_t table = kHeads * pieces * sizeof(int32_t);
    const uint64_t read = many.global_read_bytes - few.global_read_bytes;
    CHECK_EQ(read, rows + table);
    CHECK_EQ(many.cp_async_bytes - few.cp_async_bytes, by_tma ? 0 : rows);
    CHECK_EQ(many.bulk_load_bytes > few.bulk_load_bytes, by_tma);
    CHECK_EQ(many.global_written_bytes, few.global_written_bytes);
    if (dim == 128) {
      std::printf("%s, pages of %3d, %s: %llu bytes read for %llu of keys and values\n",
                  schedule.device.c_str(), page_size, by_tma ? "by TMA" : "by row",
                  static_cast<unsigned long long>(read), static_cast<unsigned long long>(rows));
    }
  });
}

TEST("sm_90a: no bank conflicts, no local memory, the shared memory of a block") {
  for_every_page_size([](const Schedule& schedule, int dim, int page_size) {
    const ptx::Counters all = count(dim, page_size, 2, schedule);
    CHECK_EQ(all.wavefronts, all.wavefronts_ideal);
    CHECK_EQ(all.local_accesses, uint64_t{0});
    CHECK(all.shared_bytes_max <= static_cast<uint64_t>(schedule.shared_memory));
  });
}
