// The cases that mutants of the append and of the check run, in groups.
#include <cstring>

#include "../kernels/device.h"
#include "../support/append_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

// Appends on the first device model.
AppendRun on_device() {
  const std::string reason = device_unavailable();
  CHECK_EQ(reason, std::string());
  return [backend = cuda_backend()](Appending& what, const flashtile_problem& problem) {
    begin(schedules().front());
    const std::string error = append_on(backend, what, problem);
    return error + finish();
  };
}

CacheSpec spec_of(int page_size, bool packed, Layout layout) {
  return {.dtype = Dtype::kFloat16,
          .heads = 4,
          .heads_kv = 2,
          .dims = {72, 40},
          .sequences = {{.seed = 1, .keys = 29, .queries = 3, .leftpad = 3, .added = 3},
                        {.seed = 2, .keys = 0, .queries = 1, .added = packed ? 1 : 3},
                        {.seed = 3, .keys = 15, .queries = 2, .added = 3}},
          .page_size = page_size,
          .packed = packed,
          .layout_k = layout};
}

// The rows that have a place, where `spoil` has made numbers wrong, and no other byte.
template <class Spoil>
void check_possible_rows(const CacheSpec& spec, const AppendRun& run, const Spoil& spoil) {
  Appending what = {CacheCall(spec)};
  const flashtile_problem problem = what.call.problem();
  spoil(what.call, problem);
  HostTensor k = what.call.k, v = what.call.v;
  expect_possible_rows(what.call, problem, k, v);
  CHECK_EQ(run(what, problem), std::string());
  CHECK(what.call.k.bytes() == k.bytes());
  CHECK(what.call.v.bytes() == v.bytes());
}

flashtile_cache_report check_on(const Backend& backend, const CacheCall& call,
                                flashtile_cache_report report) {
  Mirror mirror(backend);
  const flashtile_problem problem = mirrored(mirror, backend, call, call.problem());
  const DeviceBytes memory(backend, &report, sizeof report);
  CHECK_EQ(flashtile_check_cache(&problem, reinterpret_cast<flashtile_cache_report*>(memory.data()),
                                 nullptr),
           FLASHTILE_OK);
  memory.copy_out(&report);
  return report;
}

void check_report(const CacheCall& call, const flashtile_cache_report& before = {}) {
  CHECK_EQ(device_unavailable(), std::string());
  begin(schedules().front());
  const flashtile_cache_report expected = check_on(cpu_backend(), call, before);
  const flashtile_cache_report report = check_on(cuda_backend(), call, before);
  CHECK_EQ(finish(), std::string());
  CHECK(std::memcmp(&report, &expected, sizeof report) == 0);
}

// 40 sequences with up to 67 pages.
CacheCall many_pages() {
  CacheSpec spec = {.page_size = 2};
  for (int b = 0; b < 40; ++b)
    spec.sequences.push_back({.seed = 1, .keys = b == 30 ? 130 : 9, .added = 2});
  return CacheCall(spec);
}

}  // namespace

TEST("append rows") {
  for (const Layout layout : {Layout::kOdd, Layout::kPadded}) {
    check_append(spec_of(0, false, layout), on_device());
    check_append(spec_of(7, false, layout), on_device());
    check_append(spec_of(16, true, layout), on_device());
  }
}

TEST("append rotary") {
  for (const uint32_t flags : {0, 1, 2, 3}) {
    for (const int dim : {64, 32, 10}) {
      const CacheSpec spec = spec_of(16, flags == 1, flags < 2 ? Layout::kPadded : Layout::kOdd);
      check_rotation(spec, RotaryTable(spec.dtype, 60, dim, flags, 8), on_device());
    }
  }
  check_missing_angles(Dtype::kFloat16, on_device());
}

TEST("append wrong numbers") {
  for (const int page_size : {0, 7}) {
    const CacheSpec spec = spec_of(page_size, false, Layout::kPadded);
    const auto check = [&](const auto& spoil) { check_possible_rows(spec, on_device(), spoil); };
    check([](CacheCall& c, const flashtile_problem& p) {
      c.lengths[2] = static_cast<int32_t>(p.page_size * std::max<int64_t>(p.max_blocks, 1)) - 1;
    });
    check([](CacheCall& c, const flashtile_problem&) { c.lengths[0] = -1; });
    if (page_size == 0) continue;
    check([](CacheCall& c, const flashtile_problem& p) {
      for (int64_t i = 0; i < p.max_blocks; ++i)
        c.table[static_cast<size_t>(i)] = static_cast<int32_t>(p.num_pages);
    });
  }
}

TEST("check_cache numbers") {
  check_report(many_pages());
  for (const int column : {5, 33, 64}) {
    CacheCall call = many_pages();
    const auto row = static_cast<size_t>(30 * call.problem().block_table_stride);
    call.table[row + static_cast<size_t>(column)] = -1;
    call.table[row + 65] = -2;
    check_report(call);
    call.lengths[39] = -1;
    check_report(call);
    call.lengths[12] = -1;
    check_report(call);
  }
}

TEST("check_cache reported already") {
  CacheCall call = many_pages();
  call.lengths[12] = -1;
  check_report(call, {3, 0, 9, 9, 77, 0, 64});
}
