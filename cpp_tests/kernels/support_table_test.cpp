// The README's support tables, printed from the dispatch: flashtile_can_run is asked about every
// head dim, dtype, feature and score on each device, forward, backward and over a cache. The tests
// compare the file with the answers.
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../support/check.h"
#include "flashtile/flashtile.h"
#include "machine.h"

namespace {

constexpr int kMostHeadDim = 256;    // of the kernels
constexpr int kLastHeadDim = 65536;  // of anything
constexpr int32_t kNoRows[2] = {};

constexpr struct {
  const char* name;
  flashtile_dtype dtype;
} kDtypes[] = {{"fp16", FLASHTILE_FLOAT16},
               {"bf16", FLASHTILE_BFLOAT16},
               {"fp32", FLASHTILE_FLOAT32},
               {"fp64", FLASHTILE_FLOAT64}};

struct Asked {
  flashtile_device device;
  flashtile_dtype dtype;
  int head_dim;
};

using Change = std::function<void(flashtile_problem&)>;

// A feature is a change of the plain problem that must be accepted, too.
struct Feature {
  const char* name;
  Change change;
};

const std::vector<Feature>& features() {
  static const std::vector<Feature> all = {
      {"any `head_dim_v`",
       [](flashtile_problem& p) { p.head_dim_v = kMostHeadDim + 1 - p.head_dim; }},
      {"windows",
       [](flashtile_problem& p) {
         p.window_left = 7;
         p.window_right = 9;
       }},
      {"top-left",
       [](flashtile_problem& p) {
         p.window_right = 0;
         p.alignment = FLASHTILE_TOP_LEFT;
       }},
      {"GQA", [](flashtile_problem& p) { p.num_heads = 6; }},
      {"varlen", [](flashtile_problem& p) { p.cu_seqlens_q = p.cu_seqlens_k = kNoRows; }},
      {"unused rows", [](flashtile_problem& p) { p.seqused_q = p.seqused_k = kNoRows; }},
      {"deterministic", [](flashtile_problem& p) { p.flags = FLASHTILE_DETERMINISTIC; }},
  };
  return all;
}

flashtile_problem problem_of(const Asked& asked, const Change& change) {
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = asked.device;
  problem.dtype = problem.dtype_kv = problem.dtype_out = asked.dtype;
  problem.num_heads = problem.num_heads_kv = 2;
  problem.head_dim = asked.head_dim;
  problem.softmax_scale = 1.0f;
  if (change) change(problem);
  return problem;  // no rows: can_run looks at no pointer to data
}

bool runs_forward(const Asked& asked, const Change& change = {}) {
  const flashtile_problem problem = problem_of(asked, change);
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  return flashtile_can_run(&params, nullptr, 0) == FLASHTILE_OK;
}

bool runs_backward(const Asked& asked, const Change& change = {}) {
  const flashtile_problem problem = problem_of(asked, change);
  flashtile_backward_params params;
  flashtile_backward_init(&params);
  params.problem = &problem;
  return flashtile_can_run_backward(&params, nullptr, 0) == FLASHTILE_OK;
}

// "1-256" or "64, 128": the head dims that `holds` is true of.
std::string head_dims(const std::function<bool(int)>& holds) {
  std::string text;
  for (int first = 1; first <= kMostHeadDim; ++first) {
    if (!holds(first)) continue;
    int last = first;
    while (last < kMostHeadDim && holds(last + 1)) ++last;
    // What goes beyond the slices of the kernels goes to the end.
    if (last == kMostHeadDim && holds(kLastHeadDim)) last = kLastHeadDim;
    if (!text.empty()) text += ", ";
    text +=
        last == first ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
    first = last + 1;
  }
  return text.empty() ? "no" : text;
}

// "yes" when every head dim has the feature, forward and backward, else "no" or "in part".
std::string has(flashtile_device device, flashtile_dtype dtype, const Feature& feature) {
  int accepted = 0;
  for (int dim = 1; dim <= kMostHeadDim; ++dim) {
    accepted += runs_forward({device, dtype, dim}, feature.change) &&
                runs_backward({device, dtype, dim}, feature.change);
  }
  return accepted == kMostHeadDim ? "yes" : accepted == 0 ? "no" : "in part";
}

// The rows of one device: dtypes of which everything is the same share one.
std::string rows(const std::string& name, flashtile_device device) {
  std::string text, names, answers;
  const auto finish_row = [&] {
    if (!names.empty()) text += "| " + name + " | " + names + answers + " |\n";
  };
  for (const auto& [dtype_name, dtype] : kDtypes) {
    const auto forward = [&](int dim) { return runs_forward({device, dtype, dim}); };
    const auto backward = [&](int dim) { return runs_backward({device, dtype, dim}); };
    std::string its = " | " + head_dims(forward) + " | " + head_dims(backward);
    for (const Feature& feature : features()) its += " | " + has(device, dtype, feature);
    if (its == answers) {
      names += std::string(", ") + dtype_name;
      continue;
    }
    finish_row();
    names = dtype_name;
    answers = its;
  }
  finish_row();
  return text;
}

// A score is a change of no scores, and in a backward of the gradients that are wanted with it.
struct Score {
  const char* name;
  std::function<void(flashtile_scores&)> change;
  std::function<void(flashtile_backward_params&)> want = {};
};

flashtile_score_tensor numbers(flashtile_dtype dtype) {
  static float element = 0;
  flashtile_score_tensor tensor = {};
  tensor.data = &element;
  tensor.dtype = dtype;
  return tensor;
}

const std::vector<Score>& all_scores() {
  static const int64_t state[2] = {};
  using S = flashtile_scores;
  using B = flashtile_backward_params;
  static const std::vector<Score> all = {
      {"softcap", [](S& s) { s.softcap = 50; }},
      {"ALiBi", [](S& s) { s.alibi_slopes = numbers(FLASHTILE_FLOAT32); },
       [](B& b) { b.dalibi_slopes = numbers(FLASHTILE_FLOAT32); }},
      {"biases", [](S& s) { s.bias[0] = s.bias[1] = numbers(FLASHTILE_FLOAT16); },
       [](B& b) { b.dbias[0] = b.dbias[1] = numbers(FLASHTILE_FLOAT16); }},
      {"mask", [](S& s) { s.mask = numbers(FLASHTILE_BOOL); }},
      {"sink", [](S& s) { s.sink = numbers(FLASHTILE_FLOAT32); },
       [](B& b) { b.dsink = numbers(FLASHTILE_FLOAT32); }},
      {"query scale", [](S& s) { s.query_scale = numbers(FLASHTILE_FLOAT32); }},
      {"dropout",
       [](S& s) {
         s.dropout_p = 0.1;
         s.rng_state = state;
       }},
  };
  return all;
}

enum class Pass { kForward, kBackward, kPrefill, kDecode };

// Whether a call with this score runs, on the kernels that it has without scores.
bool runs_score(Pass pass, const Asked& asked, const Score& score) {
  flashtile_problem problem = problem_of(asked, {});
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  score.change(scores);
  problem.scores = &scores;
  if (pass == Pass::kPrefill || pass == Pass::kDecode) {
    problem.page_size = 16;
    problem.seqlen_q = pass == Pass::kDecode ? 1 : 100;
  }
  char text[512] = "";
  flashtile_status status;
  if (pass == Pass::kBackward) {
    flashtile_backward_params params;
    flashtile_backward_init(&params);
    params.problem = &problem;
    if (score.want) score.want(params);
    status = flashtile_can_run_backward(&params, text, sizeof text);
  } else {
    flashtile_forward_params params;
    flashtile_forward_init(&params);
    params.problem = &problem;
    status = flashtile_can_run(&params, text, sizeof text);
  }
  return status == FLASHTILE_OK && !std::string(text).starts_with("scores");
}

// "yes", "no", or at which head dims.
std::string has_score(Pass pass, flashtile_device device, flashtile_dtype dtype,
                      const Score& score) {
  const auto runs = [&](int dim) { return runs_score(pass, {device, dtype, dim}, score); };
  int count = 0;
  for (int dim = 1; dim <= kMostHeadDim; ++dim) count += runs(dim);
  return count == kMostHeadDim ? "yes" : count == 0 ? "no" : "yes at " + head_dims(runs);
}

// The rows of one device: passes of which everything is the same share one. All dtypes that run
// there answer the same.
std::string score_rows(const std::string& name, flashtile_device device) {
  const std::pair<const char*, Pass> passes[] = {{"forward", Pass::kForward},
                                                 {"backward", Pass::kBackward},
                                                 {"prefill over a cache", Pass::kPrefill},
                                                 {"decode", Pass::kDecode}};
  std::string text, names, answers;
  const auto finish_row = [&] {
    if (!names.empty()) text += "| " + name + " | " + names + answers + " |\n";
  };
  for (const auto& [pass_name, pass] : passes) {
    std::set<std::string> of_dtypes;
    for (const auto& [dtype_name, dtype] : kDtypes) {
      if (!runs_forward({device, dtype, kMostHeadDim})) continue;
      std::string its;
      for (const Score& score : all_scores()) its += " | " + has_score(pass, device, dtype, score);
      of_dtypes.insert(its);
    }
    CHECK_EQ(of_dtypes.size(), 1u);
    if (*of_dtypes.begin() == answers) {
      names += std::string(", ") + pass_name;
      continue;
    }
    finish_row();
    names = pass_name;
    answers = *of_dtypes.begin();
  }
  finish_row();
  return text;
}

// Calls `rows` of each device.
std::string by_device(const std::function<std::string(const char*, flashtile_device)>& rows) {
  std::string text = rows("CPU", FLASHTILE_CPU);
  ptx::machine().configure(ptx::kSm80);
  text += rows("CUDA 8.0, 163 KB shared memory", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm89);
  text += rows("CUDA 8.9, 99 KB", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm90);
  return text + rows("CUDA 9.0, 227 KB", FLASHTILE_CUDA);
}

// A table whose first columns are `header`, and whose others have the names of `all`.
template <class All>
std::string table(std::string header, std::string line, const All& all, const std::string& rows) {
  for (const auto& column : all) {
    header += std::string(" | ") + column.name;
    line += " | ---";
  }
  return header + " |\n" + line + " |\n" + rows;
}

void check_readme(const std::string& expected) {
  std::ifstream file(FLASHTILE_README);
  std::stringstream readme;
  readme << file.rdbuf();
  const bool found = readme.str().find(expected) != std::string::npos;
  if (!found) std::printf("the table should be:\n%s", expected.c_str());
  CHECK(found);
}

}  // namespace

TEST("support table in the README") {
  check_readme(table("| device | dtype | head dims forward | backward", "| --- | --- | --- | ---",
                     features(), by_device(rows)));
}

TEST("table of scores in the README") {
  check_readme(table("| device | pass", "| --- | ---", all_scores(), by_device(score_rows)));
}
