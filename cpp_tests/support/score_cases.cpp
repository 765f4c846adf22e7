#include "score_cases.h"

namespace flashtile::test {

BiasSpec bias_of(Dims dims, Dtype dtype) { return {.exists = true, .dims = dims, .dtype = dtype}; }

ScoreSpec with_bias(const BiasSpec& first, const BiasSpec& second) {
  ScoreSpec spec;
  spec.bias[0] = first;
  spec.bias[1] = second;
  return spec;
}

ScoreSpec joined(const ScoreSpec& a, const ScoreSpec& b) {
  ScoreSpec both = a;
  if (both.softcap == 0) both.softcap = b.softcap;
  if (!b.bias[1].exists && b.bias[0].exists) both.bias[a.bias[0].exists ? 1 : 0] = b.bias[0];
  if (both.alibi == 0) both.alibi = b.alibi;
  if (both.mask.kind == MaskKind::kNone) both.mask = b.mask;
  if (both.sink == SinkKind::kNone) {
    both.sink = b.sink;
    both.sink_dtype = b.sink_dtype;
  }
  if (both.dropout_p == 0) both.dropout_p = b.dropout_p;
  both.query_scale |= b.query_scale;
  both.max_logit |= b.max_logit;
  return both;
}

std::vector<NamedScores> single_options() {
  const Dims full = {}, by_head = {false, true, true, true}, keys = {true, false, false, true},
             queries = {true, true, true, false}, one = {false, false, false, false};
  std::vector<NamedScores> all = {
      {"softcap 50", ScoreSpec{.softcap = 50}},
      {"softcap 1", ScoreSpec{.softcap = 1}},
      {"bias", with_bias(bias_of(full))},
      {"bias, bf16", with_bias(bias_of(full, Dtype::kBFloat16))},
      {"bias of heads, bf16", with_bias(bias_of(by_head, Dtype::kBFloat16))},
      {"bias of keys, fp16", with_bias(bias_of(keys, Dtype::kFloat16))},
      {"bias of queries", with_bias(bias_of(queries))},
      {"bias of one number", with_bias(bias_of(one))},
      {"two biases", with_bias(bias_of(by_head), bias_of(keys, Dtype::kBFloat16))},
      {"alibi of heads", ScoreSpec{.alibi = 1}},
      {"alibi of sequences", ScoreSpec{.alibi = 2}},
      {"mask", ScoreSpec{.mask = {.kind = MaskKind::kBool}}},
      {"mask of bits", ScoreSpec{.mask = {.kind = MaskKind::kBits, .hides_rows = true}}},
      {"mask of keys", ScoreSpec{.mask = {.kind = MaskKind::kBool, .dims = keys, .hidden = 0.8}}},
      {"sink", ScoreSpec{.sink = SinkKind::kHead}},
      {"sink of sequences, bf16",
       ScoreSpec{.sink = SinkKind::kBatchHead, .sink_dtype = Dtype::kBFloat16}},
      {"sink of queries, fp16", ScoreSpec{.sink = SinkKind::kQuery, .sink_dtype = Dtype::kFloat16}},
      {"dropout 0.17", ScoreSpec{.dropout_p = 0.17}},
      {"dropout 1", ScoreSpec{.dropout_p = 1}},
      {"query scale", ScoreSpec{.query_scale = true}},
      {"max logit", ScoreSpec{.max_logit = true}},
  };
  BiasSpec odd = bias_of(full);
  odd.odd = true;
  odd.key_step = 2;
  odd.hidden = 0.2;
  odd.hides_rows = true;
  all.push_back({"bias with -inf at odd strides", with_bias(odd)});
  return all;
}

NamedScores all_options() {
  ScoreSpec spec =
      with_bias(bias_of({false, true, true, true}), bias_of({true, false, false, true}));
  spec.softcap = 5;
  spec.alibi = 2;
  spec.mask = {.kind = MaskKind::kBits};
  spec.sink = SinkKind::kQuery;
  spec.dropout_p = 0.3;
  spec.query_scale = true;
  spec.max_logit = true;
  spec.bias[0].hidden = 0.1;
  return {"all together", spec};
}

std::vector<Case> score_shapes() {
  return {
      {.name = "dense", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150},
      {.name = "more queries", .heads = 2, .heads_kv = 1, .seqlen_q = 130, .seqlen_k = 37},
      {.name = "decode", .batch = 2, .heads = 4, .heads_kv = 1, .seqlen_q = 3, .seqlen_k = 150},
      {.name = "decode in parts", .heads = 2, .heads_kv = 1, .seqlen_q = 2, .seqlen_k = 700},
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

}  // namespace flashtile::test
