// Scores on the compiled kernels: every option alone and all together against manual attention in
// fp64, forward and backward, on every device model of the machine; and the mask of dropout, which
// is the contract's bit for bit.
#include "../support/check.h"
#include "../support/score_cases.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

// Under a schedule of every device, another one from case to case; where bits are promised, under
// two, and they are the same.
void check_case(const Case& spec, Dtype dtype, const HeadDims& dims, const Mask& mask) {
  static const Backend backend = cuda_backend();
  static size_t turn = 0;
  const Setup setup = make_setup(spec, dtype, dims, mask);
  const Truth truth(setup);
  ++turn;
  for (const auto& device : schedules_by_device()) {
    for (const Schedule& schedule : schedules_of_case(device.second, turn, spec.deterministic)) {
      const std::string where = setup.name() + " on " + schedule.device + ", seed " +
                                std::to_string(schedule.seed) + ": ";
      CHECK_EQ(where + attempt_under(schedule, setup, truth, backend).wrong, where);
    }
  }
}

// Beside the CPU's shapes: whole tiles, and keys enough for the kernels for few queries.
std::vector<Case> kernel_shapes() {
  std::vector<Case> shapes = score_shapes();
  shapes.push_back({.name = "whole tiles", .heads = 2, .seqlen_q = 128, .seqlen_k = 128});
  shapes.back().heads_kv = 2;
  shapes.back().deterministic = true;
  shapes.push_back(
      {.name = "few queries", .heads = 4, .heads_kv = 2, .seqlen_q = 2, .seqlen_k = 600});
  shapes.push_back(
      {.name = "more rows", .heads = 9, .heads_kv = 1, .seqlen_q = 2, .seqlen_k = 1290});
  return shapes;
}

void check_all(const NamedScores& scores, Dtype dtype, const HeadDims& dims, const Mask& mask) {
  for (Case spec : kernel_shapes()) {
    spec.name += ", " + scores.name;
    spec.scores = scores.spec;
    check_case(spec, dtype, dims, mask);
  }
}

void run(Dtype dtype, const HeadDims& dims, const std::vector<Mask>& masks) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(dims) == 0) SKIP("this build has no kernels of this head dim");
  size_t turn = 0;
  for (const NamedScores& scores : single_options())
    check_all(scores, dtype, dims, masks[turn++ % masks.size()]);
  for (const Mask& mask : masks) check_all(all_options(), dtype, dims, mask);
}

// Several whole tiles of queries and of keys: blocks without an edge follow one another, two heads
// share the keys, and key blocks take turns at dQ.
void run_many_tiles(int head_dim) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(head_dim) == 0) SKIP("this build has no kernels of this head dim");
  Case spec = {.name = "many tiles, softcap",
               .heads = 2,
               .heads_kv = 1,
               .seqlen_q = 256,
               .seqlen_k = 256,
               .deterministic = true,
               .scores = {.softcap = 20}};
  check_case(spec, Dtype::kFloat16, head_dim, kFull);
  spec.name = "many tiles, all together";
  spec.scores = all_options().spec;
  check_case(spec, Dtype::kBFloat16, head_dim, kCausal);
}

}  // namespace

TEST("scores fp16 d64") { run(Dtype::kFloat16, 64, {kFull, kCausal, {20, 5}}); }
TEST("scores bf16 d40/64") { run(Dtype::kBFloat16, {40, 64}, {kCausal, kCausalTopLeft, kFull}); }

TEST("scores of many tiles, in turns, d64") { run_many_tiles(64); }

// What takes minutes on the machine.
TEST("scores fp16 d128") {
  if (!is_nightly()) SKIP("make test-nightly has it");
  run(Dtype::kFloat16, {128, 96}, {kFull, kCausal, {20, 5}});
}
TEST("scores bf16 d256") {
  if (!is_nightly()) SKIP("make test-nightly has it");
  run(Dtype::kBFloat16, 256, {kCausal, kFull});
}
TEST("scores of many tiles, in turns, d128 and d256") {
  if (!is_nightly()) SKIP("make test-nightly has it");
  run_many_tiles(128);
  run_many_tiles(256);
}

// A mask alone leaves scores to be scaled later: what it hides stays hidden under any scale.
TEST("scores that a mask hides, under a scale of 0 and below") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  for (const Values values : {Values::kZeroScale, Values::kNegativeScale}) {
    for (const int queries : {2, 40}) {
      const Case spec = {
          .name = "hidden",
          .heads = 2,
          .heads_kv = 1,
          .seqlen_q = queries,
          .seqlen_k = 600,
          .values = values,
          .scores = ScoreSpec{.mask = {.kind = MaskKind::kBool, .hides_rows = true}}};
      check_case(spec, Dtype::kFloat16, 64, kFull);
    }
  }
}

// Many queries are the forward's loop over a cache, few are decoded, and of sequences with both in
// one call each runs its own.
TEST("scores over a cache") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  std::vector<Case> shapes = {
      {.name = "prefill", .heads = 4, .heads_kv = 2, .seqlen_q = 90, .seqlen_k = 150},
      {.name = "decode", .heads = 4, .heads_kv = 1, .seqlen_q = 3, .seqlen_k = 210},
      {.name = "both", .heads = 2, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 140},
      {.name = "prefill of pages", .heads = 2, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 144},
      {.name = "prefill of odd pages", .heads = 2, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 140}};
  shapes[2].used_q = {70, 5};
  shapes[2].used_k = {140, 99};
  shapes[3].page_rows = 16;
  shapes[4].page_rows = 20;  // no multiple of 8 rows
  std::vector<NamedScores> options = single_options();
  options.push_back(all_options());
  for (NamedScores& scores : options) {
    if (scores.spec.dropout_p > 0 && scores.name != "all together") continue;
    scores.spec.dropout_p = 0;
    for (Case spec : shapes) {
      spec.name += " over a cache, " + scores.name;
      spec.scores = scores.spec;
      spec.batch = 2;
      spec.keys_in_cache = true;
      if (spec.seqlen_q < 90) spec.leftpad = {7, 12};
      check_case(spec, Dtype::kBFloat16, 64, spec.seqlen_q == 90 ? kFull : kCausal);
    }
  }
}

TEST("dropout keeps what the contract says") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  // v is the unit matrix: out is the probabilities.
  const Case spec = {.name = "dropout",
                     .batch = 2,
                     .heads = 3,
                     .heads_kv = 1,
                     .seqlen_q = 150,
                     .seqlen_k = 64,
                     .scores = {.dropout_p = 0.4}};
  Setup setup = make_setup(spec, Dtype::kFloat16, 64, kFull);
  setup.v.for_each([&](int64_t b, int64_t j, int64_t h, int64_t d) {
    setup.v.set(b, j, h, d, j == d ? 1.0 : 0.0);
  });
  const Backend backend = cuda_backend();
  for (const Schedule& schedule : schedules()) {
    begin(schedule);
    const RunResult result = Run(setup, backend).forward();
    CHECK_EQ(result.error + finish(), std::string());
    int64_t kept = 0, wrong = 0;
    for (size_t i = 0; i < result.values.out.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t row = at / 64 / 3;
      const bool is_kept = setup.scores.keeps(row / 150, at / 64 % 3, row % 150, at % 64);
      kept += is_kept ? 1 : 0;
      wrong += is_kept != (result.values.out[i] != 0.0) ? 1 : 0;
    }
    CHECK_EQ(wrong, 0);
    const double share = static_cast<double>(kept) / static_cast<double>(result.values.out.size());
    CHECK(std::fabs(share - 0.6) < 0.01);
  }
}
