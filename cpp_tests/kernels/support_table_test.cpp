// The README's support table, printed from the dispatch: flashtile_can_run is asked about every
// head dim, dtype and feature on each device, forward and backward. The test compares the file with
// the answers.
#include <fstream>
#include <functional>
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

// "1-256" or "64, 128": the head dims that `runs` accepts.
template <class Runs>
std::string head_dims(flashtile_device device, flashtile_dtype dtype, Runs runs) {
  std::string text;
  for (int first = 1; first <= kMostHeadDim; ++first) {
    if (!runs(Asked{device, dtype, first}, {})) continue;
    int last = first;
    while (last < kMostHeadDim && runs(Asked{device, dtype, last + 1}, {})) ++last;
    // What goes beyond the slices of the kernels goes to the end.
    if (last == kMostHeadDim && runs(Asked{device, dtype, kLastHeadDim}, {})) last = kLastHeadDim;
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
  const struct {
    const char* name;
    flashtile_dtype dtype;
  } dtypes[] = {{"fp16", FLASHTILE_FLOAT16},
                {"bf16", FLASHTILE_BFLOAT16},
                {"fp32", FLASHTILE_FLOAT32},
                {"fp64", FLASHTILE_FLOAT64}};
  std::string text, names, answers;
  const auto finish_row = [&] {
    if (!names.empty()) text += "| " + name + " | " + names + answers + " |\n";
  };
  for (const auto& [dtype_name, dtype] : dtypes) {
    std::string its = " | " + head_dims(device, dtype, runs_forward) + " | " +
                      head_dims(device, dtype, runs_backward);
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

std::string table() {
  std::string text = "| device | dtype | head dims forward | backward",
              line = "| --- | --- | --- | ---";
  for (const Feature& feature : features()) {
    text += std::string(" | ") + feature.name;
    line += " | ---";
  }
  text += " |\n" + line + " |\n" + rows("CPU", FLASHTILE_CPU);
  ptx::machine().configure(ptx::kSm80);
  text += rows("CUDA 8.0, 163 KB shared memory", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm89);
  text += rows("CUDA 8.9, 99 KB", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm90);
  text += rows("CUDA 9.0, 227 KB", FLASHTILE_CUDA);
  return text;
}

}  // namespace

TEST("support table in the README") {
  std::ifstream file(FLASHTILE_README);
  std::stringstream readme;
  readme << file.rdbuf();
  const std::string expected = table();
  if (readme.str().find(expected) == std::string::npos) {
    std::printf("the table should be:\n%s", expected.c_str());
  }
  CHECK(readme.str().find(expected) != std::string::npos);
}
