// cu_seqlens that no caller should pass: not ascending, negative, beyond the tensor. Results are
// unspecified; but every launch ends, and nothing outside of the tensors is touched.
#include <random>

#include "../support/append_case.h"
#include "../support/check.h"
#include "kernel_cases.h"
#include "machine.h"

using namespace flashtile::test;

namespace {

// Offsets of `sequences` sequences of a tensor with `rows` rows.
std::vector<int32_t> any_offsets(std::mt19937& draw, size_t sequences, int rows) {
  const auto between = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(draw);
  };
  const int32_t special[] = {0, rows, -1, rows + 1, INT32_MIN, INT32_MAX};
  std::vector<int32_t> offsets(sequences + 1);
  for (int32_t& offset : offsets) {
    offset = between(0, 3) > 0 ? between(0, rows) : special[between(0, 5)];
  }
  return offsets;
}

Setup varlen_setup(bool deterministic, const Mask& mask) {
  const Case spec = {.name = "any offsets",
                     .heads = 2,
                     .heads_kv = 1,
                     .lengths_q = {120, 100, 60, 80},
                     .lengths_k = {150, 160, 170, 180},
                     .deterministic = deterministic};
  return make_setup(spec, Dtype::kBFloat16, 64, mask);
}

// Forward and backward with the setup's offsets. The machine does not look for races: sequences
// that overlap have them.
void check_that_it_ends(const Setup& setup, const Schedule& schedule, const Backend& backend) {
  begin(schedule);
  ptx::machine().set_checks(false);
  ptx::machine().set_budget(4'000'000);  // a hundred times of what a warp needs here
  CHECK_EQ(Run(setup, backend)().error, std::string());
  CHECK_EQ(finish(), std::string());
}

void check_any_offsets(bool deterministic) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  if (slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  const std::vector<Schedule> all = schedules();
  std::mt19937 draw(7);
  for (const Mask& mask : {kFull, kCausal, Mask{90, 20}}) {
    Setup setup = varlen_setup(deterministic, mask);
    const std::vector<int32_t> ascending = setup.cu_seqlens_q;
    for (size_t i = 0; i < 60; ++i) {
      setup.cu_seqlens_q = i % 2 == 0 ? ascending : any_offsets(draw, 4, 360);
      setup.cu_seqlens_k = any_offsets(draw, 4, 660);
      check_that_it_ends(setup, all[i % all.size()], backend);
    }
  }
}

}  // namespace

// The last sequence has keys 100 to 659, but its first two blocks are nobody's work: the search for
// a slot's sequence goes wrong.
TEST("a key block whose predecessors do not exist waits for nobody") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  if (slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  Setup setup = varlen_setup(true, kFull);
  setup.cu_seqlens_k = {0, 0, 400, 100, 660};
  for (const Schedule& schedule : schedules()) check_that_it_ends(setup, schedule, backend);
}
TEST("a deterministic call ends whatever cu_seqlens hold") { check_any_offsets(true); }
TEST("a call ends whatever cu_seqlens hold") { check_any_offsets(false); }

TEST("an append touches nothing outside, whatever cu_seqlens hold") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  const std::vector<Schedule> all = schedules();
  std::mt19937 draw(5);
  for (size_t i = 0; i < 40; ++i) {
    const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                            .sequences = {{.seed = 1, .keys = 29, .queries = 2, .added = 2},
                                          {.seed = 2, .keys = 0, .queries = 2, .added = 2},
                                          {.seed = 3, .keys = 15, .queries = 2, .added = 2}},
                            .page_size = 7,
                            .packed = true};
    Appending what = {CacheCall(spec), RotaryTable(spec.dtype, 60, 32, 0)};
    what.q_out = HostTensor(spec.dtype, what.call.q.extents(), Layout::kOdd);
    const flashtile_problem problem = what.call.problem();
    what.call.cu_q = any_offsets(draw, 3, 6);
    what.call.cu_new = any_offsets(draw, 3, 6);
    begin(all[i % all.size()]);
    ptx::machine().set_checks(false);  // a row that comes twice is a race
    CHECK_EQ(append_on(backend, what, problem), std::string());
    CHECK_EQ(finish(), std::string());
    CHECK(what.call.k.gaps_are_untouched() && what.call.v.gaps_are_untouched());
    CHECK(what.q_out.gaps_are_untouched());
  }
}
