// Any subset of the options of flashtile_scores, on top of a random case; sometimes its keys lie in
// a cache. And bugs planted in what they are.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "random_case.h"

namespace flashtile::test {

inline Dims random_dims(Draw& draw) {
  return {draw.chance(0.6), draw.chance(0.6), draw.chance(0.7), draw.chance(0.8)};
}

inline Dtype random_score_dtype(Draw& draw, Dtype dtype) {
  if (dtype == Dtype::kFloat64 && draw.chance(0.5)) return dtype;
  return draw.one_of<Dtype>({Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32});
}

inline BiasSpec random_bias(Draw& draw, Dtype dtype) {
  return {.exists = true,
          .dims = random_dims(draw),
          .dtype = random_score_dtype(draw, dtype),
          .odd = draw.chance(0.5),
          .key_step = draw.chance(0.7) ? 1 : draw.between(2, 3),
          .hidden = draw.chance(0.7) ? 0.0 : 0.1 * draw.between(1, 9),
          .hides_rows = draw.chance(0.2)};
}

inline ScoreSpec random_scores(Draw& draw, Dtype dtype, bool may_drop) {
  constexpr double kChance = 0.3;
  ScoreSpec spec;
  spec.exact_dtype = dtype == Dtype::kFloat64 && draw.chance(0.5) ? dtype : Dtype::kFloat32;
  do {
    if (draw.chance(kChance)) spec.softcap = draw.one_of<double>({0.5, 2, 10, 30, 50});
    if (draw.chance(kChance)) spec.bias[0] = random_bias(draw, dtype);
    if (draw.chance(kChance / 2)) spec.bias[1] = random_bias(draw, dtype);
    if (draw.chance(kChance)) spec.alibi = draw.between(1, 2);
    if (draw.chance(kChance)) {
      spec.mask = {.kind = draw.one_of<MaskKind>({MaskKind::kBool, MaskKind::kBits}),
                   .dims = random_dims(draw),
                   .hidden = 0.1 * draw.between(0, 9),
                   .hides_rows = draw.chance(0.3)};
      if (spec.mask.kind == MaskKind::kBits) spec.mask.dims.key = true;  // a bit for each
    }
    if (draw.chance(kChance)) {
      spec.sink = draw.one_of<SinkKind>({SinkKind::kHead, SinkKind::kBatchHead, SinkKind::kQuery});
      spec.sink_dtype = random_score_dtype(draw, dtype);
    }
    if (may_drop && draw.chance(kChance)) {
      spec.dropout_p = draw.one_of<double>({0.17, 0.5, 0.9, 1.0 / 65536, 1.0});
      spec.rng_state = {static_cast<int64_t>(draw.next()), static_cast<int64_t>(draw.next())};
    }
    spec.query_scale = draw.chance(kChance / 2);
    spec.max_logit = draw.chance(kChance / 2);
  } while (!spec.exist());
  return spec;
}

// For the line of a failure.
inline std::string name_of(const Case& c) {
  const ScoreSpec& spec = c.scores;
  const auto of_dims = [](const Dims& dims) {
    return std::string(dims.batch ? "b" : "1") + (dims.head ? "h" : "1") +
           (dims.query ? "q" : "1") + (dims.key ? "k" : "1");
  };
  std::string text;
  const auto add = [&](const std::string& option) { text += ", " + option; };
  if (c.keys_in_cache) add("over a cache");
  if (c.values == Values::kZeroScale) add("scale 0");
  if (c.values == Values::kNegativeScale) add("scale below 0");
  if (spec.softcap != 0) add("softcap " + std::to_string(spec.softcap));
  for (const BiasSpec& bias : spec.bias) {
    if (!bias.exists) continue;
    add("bias " + of_dims(bias.dims) + " " + name_of(bias.dtype) + (bias.odd ? " odd" : "") +
        " step " + std::to_string(bias.key_step) + " hidden " + std::to_string(bias.hidden) +
        (bias.hides_rows ? " and rows" : ""));
  }
  if (spec.alibi > 0) add(spec.alibi == 1 ? "alibi of heads" : "alibi of sequences");
  if (spec.mask.kind != MaskKind::kNone) {
    add(std::string(spec.mask.kind == MaskKind::kBits ? "bits " : "mask ") +
        of_dims(spec.mask.dims) + " hidden " + std::to_string(spec.mask.hidden) +
        (spec.mask.hides_rows ? " and rows" : ""));
  }
  constexpr const char* kSinks[] = {"", "heads", "sequences", "queries"};
  if (spec.sink != SinkKind::kNone)
    add(std::string("sink of ") + kSinks[static_cast<int>(spec.sink)] + " " +
        name_of(spec.sink_dtype));
  if (spec.dropout_p > 0) add("dropout " + std::to_string(spec.dropout_p));
  if (spec.query_scale) add("query scale");
  if (spec.max_logit) add("max logit");
  return text;
}

// The case of the seed, with values of a size that scores do not drown in.
inline FuzzCase random_scored_case(uint64_t seed, const FuzzRange& range) {
  FuzzCase c = random_case(seed, range);
  Draw draw(seed + 0x5c0de5);
  const Values values = c.spec.values;
  if (values != Values::kZeroScale && values != Values::kNegativeScale)
    c.spec.values = Values::kNormal;
  const bool can_be_cache = !c.spec.is_varlen() && c.spec.batch > 0 && c.spec.seqlen_k > 0 &&
                            c.spec.layout != Layout::kBroadcast && !c.spec.repeats_rows;
  c.spec.keys_in_cache = can_be_cache && draw.chance(0.3);
  c.spec.scores = random_scores(draw, c.dtype, !c.spec.keys_in_cache);
  return c;
}

struct ScorePlant {
  const char* name;
  // Changes what the truth is computed from, as Plant does.
  std::function<void(ScoreInput&)> change;
};

inline const std::vector<ScorePlant>& score_plants() {
  static const std::vector<ScorePlant> all = {
      {"softcap-forgotten", [](ScoreInput& scores) { scores.spec.softcap = 0; }},
      {"softcap-a-hundredth-too-large", [](ScoreInput& scores) { scores.spec.softcap *= 1.01; }},
      {"bias-of-the-first-head-for-all",
       [](ScoreInput& scores) { scores.bias[0].dims.head = false; }},
      {"second-bias-lost", [](ScoreInput& scores) { scores.bias[1] = {}; }},
      {"slopes-of-the-first-sequence-for-all",
       [](ScoreInput& scores) { scores.alibi.dims.batch = false; }},
      {"mask-of-the-first-query-for-all",
       [](ScoreInput& scores) { scores.mask.dims.query = false; }},
      {"sink-left-out", [](ScoreInput& scores) { scores.sink = {}; }},
      {"dropout-of-another-offset", [](ScoreInput& scores) { scores.spec.rng_state[1] ^= 1; }},
      {"query-scale-of-the-first-row-for-all",
       [](ScoreInput& scores) { scores.query_scale.dims.query = false; }},
  };
  return all;
}

}  // namespace flashtile::test
