// The cases of scores that mutants of the kernels run, in groups, as mutation_cases.cpp: small, and
// stopped at the first failure.
#include <string>
#include <vector>

#include "../kernels/kernel_cases.h"
#include "../support/check.h"
#include "../support/score_cases.h"
#include "slice.h"

using namespace flashtile::test;

namespace {

struct Sample {
  Case spec;
  Mask mask = kFull;
};

// On one device of each kind that is asked for, under one schedule.
void run_samples(const std::vector<Sample>& samples) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  static const Backend backend = cuda_backend();
  for (const Sample& sample : samples) {
    const Setup setup = make_setup(sample.spec, Dtype::kFloat16, slice(), sample.mask);
    const Attempt attempt = attempt_under(schedules().front(), setup, Truth(setup), backend);
    CHECK_MESSAGE(attempt.passed(), setup.name() + ": " + attempt.wrong);
    if (!attempt.passed()) return;
  }
}

ScoreSpec by_row() {
  ScoreSpec spec = with_bias(bias_of({}));
  spec.alibi = 2;
  spec.sink = SinkKind::kQuery;
  spec.query_scale = true;
  return spec;
}
ScoreSpec dropped() {
  ScoreSpec spec = {.mask = {.kind = MaskKind::kBits, .hides_rows = true}, .dropout_p = 0.3};
  spec.sink = SinkKind::kHead;
  return spec;
}
// Biases of whole pairs, which repeat sequences or keys and queries.
ScoreSpec repeated() {
  ScoreSpec spec =
      with_bias(bias_of({false, true, true, true}), bias_of({true, true, false, false}));
  spec.softcap = 1;
  spec.alibi = 1;
  return spec;
}

std::vector<Sample> training() {
  return {
      {{.name = "by row",
        .heads = 4,
        .heads_kv = 2,
        .lengths_q = {33, 0, 20},
        .lengths_k = {50, 7, 70},
        .scores = by_row()},
       kCausal},
      {{.name = "dropped",
        .batch = 2,
        .heads = 2,
        .heads_kv = 1,
        .seqlen_q = 40,
        .seqlen_k = 150,
        .scores = dropped()}},
      {{.name = "repeated",
        .batch = 2,
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 70,
        .seqlen_k = 136,
        .scores = repeated()}},
      {{.name = "far below 0",
        .heads = 2,
        .heads_kv = 2,
        .seqlen_q = 5,
        .seqlen_k = 40,
        .values = Values::kVeryNegative,
        .scores = ScoreSpec{.max_logit = true}},
       {10, 3}},
  };
}

// One option and nothing else, which has code of its own; the bits of dropout over several heads.
std::vector<Sample> alone() {
  ScoreSpec dropped = {.dropout_p = 0.3};
  dropped.query_scale = true;
  return {
      {{.name = "cap",
        .heads = 4,
        .heads_kv = 2,
        .lengths_q = {33, 0, 100},
        .lengths_k = {50, 7, 130},
        .scores = ScoreSpec{.softcap = 1}},
       kCausal},
      {{.name = "slopes",
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 150,
        .seqlen_k = 260,
        .scores = ScoreSpec{.alibi = 1}}},
      {{.name = "bias",
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 150,
        .seqlen_k = 70,
        .scores = with_bias(bias_of({}))}},
      {{.name = "dropped",
        .heads = 4,
        .heads_kv = 1,
        .seqlen_q = 90,
        .seqlen_k = 150,
        .scores = dropped}},
  };
}

std::vector<Sample> decoding() {
  ScoreSpec capped = by_row();
  capped.softcap = 1;
  ScoreSpec masked = {.mask = {.kind = MaskKind::kBits, .hides_rows = true}};
  masked.bias[0] = bias_of({}, Dtype::kBFloat16);
  masked.sink = SinkKind::kHead;
  ScoreSpec top_left = {.alibi = 1};
  return {
      {{.name = "few queries",
        .batch = 2,
        .heads = 8,
        .heads_kv = 2,
        .seqlen_q = 2,
        .seqlen_k = 530,
        .scores = capped}},
      {{.name = "left padding",
        .batch = 2,
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 3,
        .seqlen_k = 90,
        .used_k = {90, 61},
        .keys_in_cache = true,
        .leftpad = {5, 11},
        .scores = masked}},
      {{.name = "top left",
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 3,
        .seqlen_k = 90,
        .keys_in_cache = true,
        .scores = top_left},
       kCausalTopLeft},
      {{.name = "far below 0",
        .heads = 6,
        .heads_kv = 2,
        .seqlen_q = 1,
        .seqlen_k = 90,
        .values = Values::kVeryNegative,
        .keys_in_cache = true,
        .scores = ScoreSpec{.max_logit = true}}},
  };
}

std::vector<Sample> prefill() {
  ScoreSpec masked = {.mask = {.kind = MaskKind::kBits}};
  masked.bias[0] = bias_of({});
  ScoreSpec by_bytes = {.mask = {.kind = MaskKind::kBool}};
  std::vector<Sample> samples;
  for (const ScoreSpec& scores : {masked, by_bytes}) {
    samples.push_back({{.name = "left padding",
                        .batch = 2,
                        .heads = 4,
                        .heads_kv = 1,
                        .seqlen_q = 35,
                        .seqlen_k = 90,
                        .used_k = {90, 61},
                        .keys_in_cache = true,
                        .leftpad = {5, 11},
                        .scores = scores},
                       kCausal});
  }
  return samples;
}

}  // namespace

TEST("scored training") { run_samples(training()); }
TEST("scored alone") { run_samples(alone()); }
TEST("scored decoding") { run_samples(decoding()); }
TEST("scored prefill") { run_samples(prefill()); }
