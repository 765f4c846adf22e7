// Scores on the CPU: every option against manual attention in fp64, alone and with others, forward
// and backward, on every instruction set.
#include <string>
#include <vector>

#include "../support/attempt.h"
#include "../support/compare_scores.h"
#include "../support/instruction_sets.h"

using namespace flashtile::test;

namespace {

struct NamedScores {
  std::string name;
  ScoreSpec spec;
};

BiasSpec bias_of(Dims dims, Dtype dtype = Dtype::kFloat32) {
  return {.exists = true, .dims = dims, .dtype = dtype};
}

// Every option alone, in the forms that it has.
std::vector<NamedScores> single_options() {
  const Dims full = {}, by_head = {false, true, true, true}, keys = {true, false, false, true},
             queries = {true, true, true, false}, one = {false, false, false, false};
  std::vector<NamedScores> all = {
      {"softcap 50", {.softcap = 50}},
      {"softcap 1", {.softcap = 1}},
      {"bias", {.bias = {bias_of(full)}}},
      {"bias of heads, bf16", {.bias = {bias_of(by_head, Dtype::kBFloat16)}}},
      {"bias of keys, fp16", {.bias = {bias_of(keys, Dtype::kFloat16)}}},
      {"bias of queries", {.bias = {bias_of(queries)}}},
      {"bias of one number", {.bias = {bias_of(one)}}},
      {"two biases", {.bias = {bias_of(by_head), bias_of(keys, Dtype::kBFloat16)}}},
      {"alibi of heads", {.alibi = 1}},
      {"alibi of sequences", {.alibi = 2}},
      {"mask", {.mask = {.kind = MaskKind::kBool}}},
      {"mask of bits", {.mask = {.kind = MaskKind::kBits, .hides_rows = true}}},
      {"mask of keys", {.mask = {.kind = MaskKind::kBool, .dims = keys, .hidden = 0.8}}},
      {"sink", {.sink = SinkKind::kHead}},
      {"sink of sequences, bf16", {.sink = SinkKind::kBatchHead, .sink_dtype = Dtype::kBFloat16}},
      {"sink of queries, fp16", {.sink = SinkKind::kQuery, .sink_dtype = Dtype::kFloat16}},
      {"dropout 0.17", {.dropout_p = 0.17}},
      {"dropout 1", {.dropout_p = 1}},
      {"query scale", {.query_scale = true}},
      {"max logit", {.max_logit = true}},
  };
  BiasSpec odd = bias_of(full);
  odd.odd = true;
  odd.key_step = 2;
  odd.hidden = 0.2;
  odd.hides_rows = true;
  all.push_back({"bias with -inf at odd strides", {.bias = {odd}}});
  return all;
}

NamedScores all_options() {
  ScoreSpec spec = {.softcap = 5,
                    .bias = {bias_of({false, true, true, true}), bias_of({true, false, false, true})},
                    .alibi = 2,
                    .mask = {.kind = MaskKind::kBits},
                    .sink = SinkKind::kQuery,
                    .dropout_p = 0.3,
                    .query_scale = true,
                    .max_logit = true};
  spec.bias[0].hidden = 0.1;
  return {"all together", spec};
}

void check(const Case& spec, Dtype dtype, const HeadDims& dims, const Mask& mask,
           const std::string& set) {
  const Setup setup = make_setup(spec, dtype, dims, mask);
  const Truth truth(setup);
  const RunResult result = Run(setup, cpu_backend())();
  const std::string where = set + " " + setup.name() + ": ";
  CHECK_EQ(where + result.error, where);
  const Verdict verdict = compare(setup, truth, result.values);
  CHECK_MESSAGE(verdict.passed(), where + verdict.text());
  const Comparison scores = compare_scores(setup, truth, result.scores);
  CHECK_MESSAGE(scores.passed(), where + scores.where);
  const Comparison most = compare_max_logit(setup, truth, result.scores);
  CHECK_MESSAGE(most.ratio <= 1, where + most.where);
}

// Few queries are decoded, many are not; 1100 keys are cut into parts.
std::vector<Case> shapes() {
  return {
      {.name = "dense", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150},
      {.name = "more queries", .heads = 2, .heads_kv = 1, .seqlen_q = 130, .seqlen_k = 37},
      {.name = "decode", .batch = 2, .heads = 4, .heads_kv = 1, .seqlen_q = 3, .seqlen_k = 150},
      {.name = "one query", .batch = 1, .heads = 2, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 40},
      {.name = "varlen",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {33, 0, 20, 1},
       .lengths_k = {50, 7, 0, 90},
       .tail_q = 3,
       .layout = Layout::kPadded},
      {.name = "seqused",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 60,
       .used_q = {40, 21},
       .used_k = {17, 60},
       .layout = Layout::kOdd},
  };
}

void check_all(const NamedScores& scores, Dtype dtype, const Mask& mask, const std::string& set) {
  for (Case spec : shapes()) {
    spec.name += ", " + scores.name;
    spec.scores = scores.spec;
    check(spec, dtype, dtype == Dtype::kBFloat16 ? HeadDims(40) : HeadDims(24, 40), mask, set);
  }
}

}  // namespace

TEST("every option alone, fp32 and bf16, full and causal") {
  for (const NamedScores& scores : single_options()) {
    check_all(scores, Dtype::kFloat32, kFull, "");
    check_all(scores, Dtype::kBFloat16, kCausal, "");
  }
}

TEST("every option in fp64, with exact numbers in fp64, and in fp16") {
  for (NamedScores scores : single_options()) {
    check_all(scores, Dtype::kFloat16, {20, 5}, "");
    for (BiasSpec& bias : scores.spec.bias) bias.dtype = Dtype::kFloat64;
    scores.spec.sink_dtype = scores.spec.exact_dtype = Dtype::kFloat64;
    check_all(scores, Dtype::kFloat64, kCausalTopLeft, "");
  }
}

TEST("all options together, on every instruction set") {
  for_each_instruction_set([&](const InstructionSet& set) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      for (const Mask& mask : {kFull, kCausal}) check_all(all_options(), dtype, mask, set.name);
    }
  });
}

TEST("long keys, in parts") {
  const Case spec = {.name = "parts",
                     .heads = 2,
                     .heads_kv = 1,
                     .seqlen_q = 1100,
                     .seqlen_k = 2300,
                     .scores = all_options().spec};
  check(spec, Dtype::kFloat32, 16, kCausal, "");
  check(spec, Dtype::kBFloat16, 16, kFull, "");
}
