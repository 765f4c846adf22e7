// The README's support table, printed from the dispatch: every head dim and dtype is asked of
// flashtile_can_run on each device. The test compares the file with the answer.
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "../check.h"
#include "flashtile/flashtile.h"
#include "machine.h"

namespace {

constexpr int kMostHeadDim = 256;

struct Asked {
  flashtile_device device;
  flashtile_dtype dtype;
  int head_dim;
};

flashtile_problem problem_of(const Asked& asked) {
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = asked.device;
  problem.dtype = problem.dtype_kv = problem.dtype_out = asked.dtype;
  problem.num_heads = problem.num_heads_kv = 1;
  problem.head_dim = asked.head_dim;
  problem.softmax_scale = 1.0f;
  return problem;  // no rows: can_run looks at no pointer
}

bool runs_forward(const Asked& asked) {
  const flashtile_problem problem = problem_of(asked);
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  return flashtile_can_run(&params, nullptr, 0) == FLASHTILE_OK;
}

bool runs_backward(const Asked& asked) {
  const flashtile_problem problem = problem_of(asked);
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
    if (!runs(Asked{device, dtype, first})) continue;
    int last = first;
    while (last < kMostHeadDim && runs(Asked{device, dtype, last + 1})) ++last;
    if (!text.empty()) text += ", ";
    text +=
        last == first ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
    first = last + 1;
  }
  return text.empty() ? "no" : text;
}

std::string row(const std::string& name, flashtile_device device) {
  std::string text;
  const struct {
    const char* name;
    flashtile_dtype dtype;
  } dtypes[] = {{"fp16", FLASHTILE_FLOAT16},
                {"bf16", FLASHTILE_BFLOAT16},
                {"fp32", FLASHTILE_FLOAT32},
                {"fp64", FLASHTILE_FLOAT64}};
  for (const auto& [dtype_name, dtype] : dtypes) {
    text += "| " + name + " | " + dtype_name + " | " + head_dims(device, dtype, runs_forward) +
            " | " + head_dims(device, dtype, runs_backward) + " |\n";
  }
  return text;
}

std::string table() {
  std::string text =
      "| device | dtype | head dims forward | head dims backward |\n| --- | --- | --- | --- |\n";
  text += row("CPU", FLASHTILE_CPU);
  ptx::machine().configure(ptx::kSm80);
  text += row("CUDA 8.0, 163 KB shared memory", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm89);
  text += row("CUDA 8.9, 99 KB", FLASHTILE_CUDA);
  ptx::machine().configure(ptx::kSm90);
  text += row("CUDA 9.0, 227 KB", FLASHTILE_CUDA);
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
