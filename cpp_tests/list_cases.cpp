// Prints the test matrix as JSON, so that pytest runs the same cells: a list of objects whose
// fields are those of Case and Cell. "cuda_refusal" is the sentence with which CUDA refuses the
// cell. Cells of score_matrix.h have "scores", with the fields of ScoreSpec.
#include <cstdio>
#include <string>
#include <vector>

#include "support/score_matrix.h"

using namespace flashtile::test;

namespace {

std::string list(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return "[" + text + "]";
}

class Object {
 public:
  void number(const char* key, int64_t value) { add(key, std::to_string(value)); }
  void flag(const char* key, bool value) { add(key, value ? "true" : "false"); }
  void numbers(const char* key, const std::vector<int>& values) { add(key, list(values)); }
  // Of characters that JSON need not escape.
  void text(const char* key, const std::string& value) { add(key, '"' + value + '"'); }
  std::string json() const { return "{" + fields_ + "}"; }
  // `value`: JSON.
  void add(const char* key, const std::string& value) {
    fields_ += (fields_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + value;
  }

 private:
  std::string fields_;
};

std::string decimal(double x) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", x);
  return text;
}

void add_dims(const Dims& dims, Object& object) {
  object.numbers("dims",
                 {dims.batch ? 1 : 0, dims.head ? 1 : 0, dims.query ? 1 : 0, dims.key ? 1 : 0});
}

std::string json(const BiasSpec& bias) {
  Object object;
  add_dims(bias.dims, object);
  object.text("dtype", name_of(bias.dtype));
  object.flag("odd", bias.odd);
  object.add("hidden", decimal(bias.hidden));
  object.flag("hides_rows", bias.hides_rows);
  return object.json();
}

std::string json(const MaskSpec& mask) {
  Object object;
  add_dims(mask.dims, object);
  object.flag("bits", mask.kind == MaskKind::kBits);
  object.add("hidden", decimal(mask.hidden));
  object.flag("hides_rows", mask.hides_rows);
  return object.json();
}

std::string json(const ScoreSpec& scores) {
  constexpr const char* kSinks[] = {"", "heads", "batch and heads", "queries"};
  Object object;
  std::string biases;
  for (const BiasSpec& bias : scores.bias) {
    if (bias.exists) biases += (biases.empty() ? "" : ", ") + json(bias);
  }
  object.add("softcap", decimal(scores.softcap));
  object.add("bias", "[" + biases + "]");
  object.number("alibi", scores.alibi);
  object.add("mask", scores.mask.kind == MaskKind::kNone ? "null" : json(scores.mask));
  object.text("sink", kSinks[static_cast<int>(scores.sink)]);
  object.text("sink_dtype", name_of(scores.sink_dtype));
  object.add("dropout_p", decimal(scores.dropout_p));
  object.flag("query_scale", scores.query_scale);
  object.flag("max_logit", scores.max_logit);
  return object.json();
}

std::string json(const Cell& cell) {
  const Case& spec = cell.spec;
  Object object;
  object.number("index", cell.index);
  object.flag("in_pairs", cell.in_pairs);
  object.text("name", spec.name);
  object.text("dtype", name_of(cell.dtype));
  object.number("head_dim", cell.head_dims.qk);
  object.number("head_dim_v", cell.head_dims.v);
  object.number("window_left", cell.mask.left);
  object.number("window_right", cell.mask.right);
  object.flag("top_left", cell.mask.top_left);
  object.number("batch", spec.batch);
  object.number("heads", spec.heads);
  object.number("heads_kv", spec.heads_kv);
  object.number("seqlen_q", spec.seqlen_q);
  object.number("seqlen_k", spec.seqlen_k);
  object.numbers("lengths_q", spec.lengths_q);
  object.numbers("lengths_k", spec.lengths_k);
  object.numbers("used_q", spec.used_q);
  object.numbers("used_k", spec.used_k);
  object.number("tail_q", spec.tail_q);
  object.number("tail_k", spec.tail_k);
  object.text("layout", name_of(spec.layout));
  object.flag("deterministic", spec.deterministic);
  object.flag("dlse", spec.dlse);
  object.text("cuda_refusal", expected_refusal(cell, true));
  if (spec.scores.exist()) {
    object.flag("keys_in_cache", spec.keys_in_cache);
    object.add("scores", json(spec.scores));
  }
  return object.json();
}

}  // namespace

int main() {
  bool first = true;
  for (const std::vector<Cell>* const cells : {&matrix(), &score_matrix()}) {
    for (const Cell& cell : *cells) {
      std::printf("%s%s", first ? "[\n" : ",\n", json(cell).c_str());
      first = false;
    }
  }
  std::printf("\n]\n");
  return 0;
}
