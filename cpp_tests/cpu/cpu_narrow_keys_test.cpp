// fp32 queries over keys and values of 16 bits: against manual attention, in every way that keys
// lie, and what is refused.
#include <memory>

#include "../support/append_case.h"
#include "../support/attempt.h"
#include "../support/cases.h"
#include "../support/check.h"
#include "../support/score_cases.h"
#include "../support/small_call.h"

using namespace flashtile::test;

namespace {

const Dtype kNarrow[] = {Dtype::kFloat16, Dtype::kBFloat16};

void run_cases(const std::vector<Case>& cases, const std::vector<HeadDims>& all) {
  uint64_t seed = 1;
  for (Case spec : cases) {
    for (const Mask& mask : spec.masks) {
      for (const HeadDims& dims : all) {
        spec.dtype_kv = kNarrow[seed % 2];
        const Setup setup = make_setup(spec, Dtype::kFloat32, dims, mask, seed++);
        const Attempt attempt = attempt_on_cpu(setup, Truth(setup));
        CHECK_MESSAGE(attempt.passed(), setup.name() + ": " + attempt.wrong);
      }
    }
  }
}

}  // namespace

TEST("shapes, options, varlen, rows in use") {
  run_cases(joined({shape_cases(), option_cases(), varlen_cases(), used_cases()}), {{40, 19}});
}

TEST("head dims") { run_cases(head_dim_cases(), {1, 33, 64, 80, 128, {64, 200}, 256}); }

TEST("pages, a contiguous cache and appended rows") {
  for (const Dtype dtype_kv : kNarrow) {
    for (const int page_size : {0, 7, 16, 256}) {
      const CacheSpec spec = {.heads = 4,
                              .heads_kv = 2,
                              .sequences = mixed_sequences(),
                              .page_size = page_size,
                              .batch_idx = page_size == 0,
                              .packed = true,
                              .dtype_kv = dtype_kv};
      check_cache(spec);
      check_append(spec, append_on_cpu);
    }
  }
}

TEST("a backward and a rotation are refused") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.dtype_kv = FLASHTILE_BFLOAT16;
  char why[200] = "";
  CHECK_EQ(flashtile_can_run(&call->forward, why, sizeof why), FLASHTILE_OK);
  CHECK_EQ(flashtile_can_run_backward(&call->backward, why, sizeof why), FLASHTILE_UNSUPPORTED);
  CHECK_EQ(std::string(why),
           std::string("dtype_kv is bfloat16 in a backward; allowed: float32, the dtype of q"));

  Appending what = {
      CacheCall({.sequences = {{.keys = 3, .added = 1}}, .dtype_kv = Dtype::kFloat16}),
      RotaryTable(Dtype::kFloat32, 10, 64, 0)};
  CHECK_EQ(append_on_cpu(what, what.call.problem()),
           std::string("rotary_cos is set and dtype_kv is float16; allowed: NULL, or a dtype_kv of "
                       "float32, the dtype of q"));
}
