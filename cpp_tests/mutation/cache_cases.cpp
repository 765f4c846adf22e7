// The cases over a key/value cache that mutants run, as mutation_cases.cpp.
#include "../kernels/cache_on_device.h"
#include "../support/check.h"
#include "slice.h"

using namespace flashtile::test;

namespace {

// Under every schedule of the device, until something is wrong.
void run_specs(const std::vector<CacheSpec>& specs) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  for (CacheSpec spec : specs) {
    spec.dtype = Dtype::kFloat16;
    for (const Schedule& schedule : schedules()) {
      const Attempt attempt = attempt_cache(schedule, spec);
      CHECK_MESSAGE(attempt.passed(), spec.name() + ": " + attempt.wrong);
      if (!attempt.passed()) return;
    }
  }
}

// Decoding and prefill, a step and a page that end with the sequence, and past them.
std::vector<CacheSpec> pages() {
  std::vector<CacheSpec> specs;
  for (const int page_size : {0, 7, 16}) {
    specs.push_back({.heads = 6,
                     .heads_kv = 2,
                     .dims = slice(),
                     .sequences = {{.seed = 1, .keys = 300, .leftpad = 5},
                                   {.seed = 2, .keys = 128, .queries = 3},
                                   {.seed = 3, .keys = 90, .queries = 50, .leftpad = 3},
                                   {.seed = 4, .keys = 0}},
                     .page_size = page_size,
                     .batch_idx = true,
                     .packed = true,
                     .layout_k = page_size == 7 ? Layout::kOdd : Layout::kPadded});
  }
  return specs;
}

std::vector<CacheSpec> masks() {
  std::vector<CacheSpec> specs;
  for (const Mask& mask : {kCausal, Mask{17, 9}, Mask{40, 0}}) {
    specs.push_back({.heads = 2,
                     .heads_kv = 2,
                     .dims = slice(),
                     .sequences = {{.seed = 1, .keys = 300, .queries = 40},
                                   {.seed = 2, .keys = 7, .queries = 30},
                                   {.seed = 3, .keys = 260, .queries = 60}},
                     .page_size = 16,
                     .packed = true,
                     .mask = mask,
                     .layout_k = Layout::kPadded});
  }
  return specs;
}

// Prefill alone, on rows that TMA takes: pages that it takes, too, and others.
std::vector<CacheSpec> loads() {
  std::vector<CacheSpec> specs;
  for (const int page_size : {0, 7, 16, 64, 256}) {
    specs.push_back({.heads = 2,
                     .heads_kv = 1,
                     .dims = slice(),
                     .sequences = {{.seed = 1, .keys = 420, .queries = 70},
                                   {.seed = 2, .keys = 131, .queries = 140}},
                     .page_size = page_size,
                     .packed = true,
                     .mask = page_size == 16 ? kFull : kCausal,
                     .layout_k = Layout::kPadded});
  }
  specs.push_back(specs[0]);
  specs.back().sequences[0].leftpad = 5;
  return specs;
}

std::vector<CacheSpec> parts() {
  std::vector<CacheSpec> specs;
  for (const int num_splits : {0, 2, 3}) {
    specs.push_back({.heads = 4,
                     .heads_kv = 1,
                     .dims = slice(),
                     .sequences = {{.seed = 1, .keys = 700},
                                   {.seed = 2, .keys = 450},
                                   {.seed = 3, .keys = 500, .queries = 4},
                                   {.seed = 4, .keys = 600, .queries = 5},
                                   {.seed = 5, .keys = 410, .queries = 16}},
                     .page_size = 16,
                     .packed = true,
                     .mask = kFull,
                     .num_splits = num_splits});
  }
  CacheSpec several = {.heads = 64, .heads_kv = 64, .dims = slice()};  // parts of a block
  several.sequences.resize(64);
  several.sequences[7] = {.seed = 1, .keys = 200};
  several.page_size = 64;
  specs.push_back(several);
  for (CacheSequence& sequence : several.sequences) sequence.queries = 0;
  several.sequences[7].queries = 18;
  several.packed = true;
  specs.push_back(several);
  return specs;
}

std::vector<CacheSpec> new_rows() {
  std::vector<CacheSpec> specs = {packed_append(), dense_append(3, 2), dense_append(12, 3),
                                  dense_append(70, 1)};
  for (CacheSpec& spec : specs) spec.dims = slice();
  return specs;
}

// By the row, too, where keys are padded.
std::vector<CacheSpec> ends() {
  std::vector<CacheSpec> specs;
  for (const HeadDims& dims : {HeadDims(slice(), slice() - 24), HeadDims(slice() - 24, slice())}) {
    for (const int queries : {3, 70}) {
      for (const int leftpad : {0, 3}) {
        specs.push_back(rows_that_end_apart(queries, dims));
        for (CacheSequence& sequence : specs.back().sequences) sequence.leftpad = leftpad;
      }
    }
  }
  return specs;
}

std::vector<CacheSpec> negative() {
  std::vector<CacheSpec> specs;
  for (const int queries : {3, 20, 70}) {
    specs.push_back({.heads = 2,
                     .heads_kv = 1,
                     .dims = slice(),
                     .sequences = {{.seed = 1, .keys = 140, .queries = queries}},
                     .scale = -0.2,
                     .layout_k = Layout::kPadded});
  }
  return specs;
}

std::vector<CacheSpec> without_lse() {
  std::vector<CacheSpec> specs = negative();
  for (CacheSpec& spec : specs) spec.lse = false;
  return specs;
}

}  // namespace

TEST("cache new rows") { run_specs(new_rows()); }
TEST("cache ends") { run_specs(ends()); }
TEST("cache negative") { run_specs(negative()); }
TEST("cache no lse") { run_specs(without_lse()); }
TEST("cache pages") { run_specs(pages()); }
TEST("cache masks") { run_specs(masks()); }
TEST("cache loads") { run_specs(loads()); }
TEST("cache parts") { run_specs(parts()); }
