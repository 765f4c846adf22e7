// The CPU op as a whole, on every instruction set that runs here: against manual attention, for
// several thread counts, with little workspace, with NaN in places that rows do not see.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../support/attempt.h"
#include "../support/check.h"
#include "../support/instruction_sets.h"
#include "../support/runner.h"
#include "api/backend.h"
#if defined(__unix__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

// Absent in a build without OpenMP; the tests then have one thread.
extern "C" void omp_set_num_threads(int) __attribute__((weak));

using namespace flashtile::test;

namespace {

void set_threads(int threads) {
  if (omp_set_num_threads != nullptr) omp_set_num_threads(threads);
}

// Runs `visit` with each instruction set that this machine has, the emulated AMX tiles included.
template <class Visit>
void for_each_instruction_set(const Visit& visit) {
  for (const InstructionSet& set : instruction_sets()) {
    const ForcedInstructionSet forced(set.name);
    visit(set);
  }
}

std::vector<Case> few_cases() {
  return {
      {.name = "ragged, GQA", .heads = 4, .heads_kv = 2, .seqlen_q = 131, .seqlen_k = 197},
      {.name = "more queries than keys",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 150,
       .seqlen_k = 70,
       .layout = Layout::kOdd},
      {.name = "decode",
       .heads = 6,
       .heads_kv = 2,
       .seqlen_q = 2,
       .seqlen_k = 300,
       .layout = Layout::kMixed},
      {.name = "lengths with empty sequences",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {40, 0, 3, 129},
       .lengths_k = {33, 5, 0, 200},
       .layout = Layout::kPadded},
  };
}

// Forward and backward of one head under a window of 301 keys; k and v are the same memory, what is
// read besides is zeros.
struct WindowCall {
  std::vector<float> q, out, dq, lse, dk, dv;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  flashtile_forward_params forward = {};
  flashtile_backward_params backward = {};

  WindowCall(Dtype dtype, int64_t queries, int64_t keys, int64_t dim, void* kv)
      : q(static_cast<size_t>(queries * dim)),
        out(q.size()),
        dq(q.size()),
        lse(static_cast<size_t>(queries)),
        dk(static_cast<size_t>(keys * dim)),
        dv(dk.size()) {
    problem.dtype = problem.dtype_kv = problem.dtype_out = static_cast<flashtile_dtype>(dtype);
    problem.batch = problem.num_heads = problem.num_heads_kv = 1;
    problem.head_dim = dim;
    problem.seqlen_q = queries;
    problem.seqlen_k = keys;
    problem.softmax_scale = 1.0f;
    problem.window_left = 300;
    problem.window_right = 0;
    flashtile_forward_init(&forward);
    flashtile_backward_init(&backward);
    forward.problem = backward.problem = &problem;
    forward.q = backward.q = backward.dout = {q.data(), 0, dim, dim};
    forward.out = backward.out = {out.data(), 0, dim, dim};
    backward.dq = {dq.data(), 0, dim, dim};
    forward.k = forward.v = backward.k = backward.v = {kv, 0, dim, dim};
    backward.dk = {dk.data(), 0, dim, dim};
    backward.dv = {dv.data(), 0, dim, dim};
    forward.softmax_lse = lse.data();
    backward.softmax_lse = lse.data();
  }

  void run() {
    std::vector<char> memory;
    const auto aligned = [&](size_t bytes) {
      memory.assign(bytes + 64, 0);
      return memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
    };
    CHECK_EQ(flashtile_workspace_size(&forward, &forward.workspace_bytes), FLASHTILE_OK);
    forward.workspace = aligned(forward.workspace_bytes);
    CHECK_EQ(flashtile_forward(&forward, nullptr), FLASHTILE_OK);
    CHECK_EQ(flashtile_workspace_size_backward(&backward, &backward.workspace_bytes), FLASHTILE_OK);
    backward.workspace = aligned(backward.workspace_bytes);
    CHECK_EQ(flashtile_backward(&backward, nullptr), FLASHTILE_OK);
  }
};

}  // namespace

TEST("every instruction set agrees with manual attention") {
  for_each_instruction_set([](const InstructionSet& set) {
    uint64_t seed = 11;
    for (const Case& spec : few_cases()) {
      for (const Dtype dtype :
           {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
        if (!set.has(dtype)) continue;
        for (const int head_dim : {40, 64}) {
          for (const Mask& mask : spec.masks) {
            const auto draw = [&](uint64_t drawn) {
              return make_setup(spec, dtype, head_dim, mask, drawn);
            };
            const Attempt attempt = attempt_draws_on_cpu(seed, draw);
            CHECK_MESSAGE(attempt.passed(),
                          set.name + " " + draw(seed).name() + ": " + attempt.wrong);
            ++seed;
          }
        }
      }
    }
  });
}

TEST("results are bitwise equal for any number of threads") {
  // Long keys: the backward splits them; few queries: the decode pass does.
  const std::vector<Case> cases = {
      {.name = "split keys", .seqlen_q = 65, .seqlen_k = 2100},
      {.name = "many tasks",
       .batch = 2,
       .heads = 4,
       .heads_kv = 2,
       .seqlen_q = 200,
       .seqlen_k = 230},
      {.name = "decode", .heads = 4, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 700},
  };
  for_each_instruction_set([&](const InstructionSet& set) {
    for (const Case& spec : cases) {
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
        if (!set.has(dtype)) continue;
        const Setup setup = make_setup(spec, dtype, 32, kCausal, 5);
        set_threads(1);
        const AttentionOutput one = Run(setup, cpu_backend())().values;
        for (const int threads : {2, 3, 8}) {
          set_threads(threads);
          CHECK_MESSAGE(identical(Run(setup, cpu_backend())().values, one),
                        set.name + " " + setup.name() + ", threads " + std::to_string(threads));
        }
      }
    }
  });
  set_threads(2);
}

TEST("less workspace means fewer threads, too little is refused") {
  set_threads(4);
  flashtile::ForwardParams params;
  std::vector<float> qkv(64 * 32, 0.5f), small(64 * 32), large(64 * 32);
  params.problem = {.batch = 1,
                    .num_heads = 1,
                    .num_heads_kv = 1,
                    .head_dim = 32,
                    .seqlen_q = 64,
                    .seqlen_k = 64,
                    .total_q = 64,
                    .total_k = 64,
                    .exact_scale = 1.0,
                    .band = {},
                    .dtype = flashtile::Dtype::kFloat32};
  params.q = params.k = params.v = {qkv.data(), 0, 32, 32};
  params.out = {large.data(), 0, 32, 32};
  flashtile::Plan<flashtile::ForwardParams> plan;
  CHECK_EQ(flashtile::cpu::choose(params, {}, 0, plan), FLASHTILE_OK);
  const flashtile::WorkspaceSize size = plan.workspace;
  const size_t bytes = size.wanted;
  void* const workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  params.workspace = workspace;
  params.workspace_bytes = bytes;
  CHECK_EQ(flashtile::cpu::run(params, {}, plan), FLASHTILE_OK);
  params.out.data = small.data();
  params.workspace_bytes = 1000;
  CHECK_EQ(flashtile::cpu::run(params, {}, plan), FLASHTILE_WORKSPACE_TOO_SMALL);
  CHECK(std::strstr(flashtile_last_error(), "workspace_bytes is 1000") != nullptr);
  CHECK(small == std::vector<float>(small.size()));  // nothing was written
  size_t enough = 1000;
  while (flashtile::cpu::run(params, {}, plan) != FLASHTILE_OK)
    params.workspace_bytes = enough += 1000;
  CHECK(enough < bytes);
  CHECK(enough >= size.least && enough < size.least + 1000);
  CHECK(small == large);
  std::free(workspace);
  set_threads(2);
}

TEST("wrong hints of the longest sequence leave room for one thread") {
  set_threads(4);
  // Odd strides: the runner tells seqlen_q = 0 and seqlen_k = 1.
  const Case spec{.name = "",
                  .heads = 2,
                  .heads_kv = 2,
                  .lengths_q = {3, 2, 60},
                  .lengths_k = {2047, 900, 1100},
                  .layout = Layout::kOdd};
  for_each_instruction_set([&](const InstructionSet& set) {
    const Setup setup = make_setup(spec, Dtype::kBFloat16, 16, kFull);
    const RunResult result = Run(setup, cpu_backend())();
    CHECK_MESSAGE(result.error.empty(), set.name + ": " + result.error);
  });
  set_threads(2);
}

TEST("a workspace is no larger than the tensors") {
  flashtile::ForwardParams forward;
  flashtile::Problem& problem = forward.problem;
  problem.batch = 1000;
  problem.num_heads = 32;
  problem.num_heads_kv = 8;
  problem.head_dim = problem.head_dim_v = 128;
  problem.total_q = problem.total_k = 1000000;
  std::vector<int32_t> cu_seqlens(1001);
  problem.cu_seqlens_q = problem.cu_seqlens_k = cu_seqlens.data();  // not read
  problem.dtype = flashtile::Dtype::kFloat32;
  const auto tensors = size_t{1000000} * (2 * 32 + 2 * 8) * 128 * sizeof(float);
  for (const int64_t longest : {0, 1, 1000, 1000000}) {
    problem.seqlen_q = problem.seqlen_k = longest;
    flashtile::Plan<flashtile::ForwardParams> plan;
    CHECK_EQ(flashtile::cpu::choose(forward, {}, 0, plan), FLASHTILE_OK);
    CHECK_MESSAGE(plan.workspace.wanted < tensors / 4,
                  "forward " + std::to_string(plan.workspace.wanted));
    flashtile::BackwardParams backward;
    backward.problem = problem;
    flashtile::Plan<flashtile::BackwardParams> backward_plan;
    CHECK_EQ(flashtile::cpu::choose(backward, {}, 0, backward_plan), FLASHTILE_OK);
    CHECK_MESSAGE(backward_plan.workspace.wanted < tensors / 4,
                  "backward " + std::to_string(backward_plan.workspace.wanted));
  }
}

#if defined(__unix__)
TEST("keys that no query sees are not read") {
  constexpr size_t kBytes = size_t{1} << 20, kHidden = kBytes / 4 * 3;
  constexpr int64_t kDim = 64;
  void* const kv =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(kv != MAP_FAILED);
  mprotect(kv, kHidden, PROT_NONE);  // the rest is zeros
  for_each_instruction_set([&](const InstructionSet& set) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      for (const int64_t queries : {1, 64}) {
        const int64_t keys = static_cast<int64_t>(kBytes) / bytes_of(dtype) / kDim;
        WindowCall call(dtype, queries, keys, kDim, kv);
        call.run();
        CHECK_MESSAGE(std::fabs(call.lse[0] - std::log(301.0f)) < 1e-5f, set.name);
      }
    }
  });
  munmap(kv, kBytes);
}
#endif

TEST("the caller's denormal mode is kept") {
#if defined(__SSE2__)
  const Setup setup =
      make_setup({.name = "", .seqlen_q = 40, .seqlen_k = 40}, Dtype::kFloat32, 8, kCausal);
  for (const unsigned mode : {0x1f80u, 0x9fc0u}) {  // denormals on, and off (FTZ | DAZ)
    _mm_setcsr(mode);
    Run(setup, cpu_backend())();
    CHECK_EQ(_mm_getcsr() & 0xffc0u, mode & 0xffc0u);  // without the exception flags
  }
  _mm_setcsr(0x1f80u);
#else
  SKIP("the control register is read on x86 only");
#endif
}

TEST("an instruction set that is not there is refused by name") {
  setenv("FLASHTILE_CPU_ISA", "quantum", 1);
  const Setup setup =
      make_setup({.name = "", .seqlen_q = 4, .seqlen_k = 4}, Dtype::kFloat32, 8, kCausal);
  const RunResult result = Run(setup, cpu_backend())();
  CHECK(result.error.find("\"quantum\"") != std::string::npos);
  CHECK(std::string(flashtile::cpu::instruction_set_used()).empty());
  unsetenv("FLASHTILE_CPU_ISA");
}
