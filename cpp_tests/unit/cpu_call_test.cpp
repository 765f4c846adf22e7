// The CPU op as a whole, on every instruction set that runs here: against manual attention, for
// several thread counts, with little workspace, with NaN in places that rows do not see.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "../compare.h"
#include "../runner.h"
#include "backend.h"
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
  for (const char* name : {"portable", "avx2", "avx512", "amx", "amx-emulated"}) {
    setenv("FLASHTILE_CPU_ISA", name, 1);
    if (std::string(flashtile::cpu::instruction_set_used()) == name) {
      visit(std::string(name));
    } else {
      std::printf("  not on this machine: %s\n", name);
    }
  }
  unsetenv("FLASHTILE_CPU_ISA");
}

bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

bool identical(const AttentionOutput& a, const AttentionOutput& b) {
  return identical(a.out, b.out) && identical(a.lse, b.lse) && identical(a.dq, b.dq) &&
         identical(a.dk, b.dk) && identical(a.dv, b.dv);
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

// One sequence with the element (row, head 0, column 1) of `tensor` replaced.
AttentionOutput run_with(Setup setup, char tensor, int64_t row, double value) {
  HostTensor& target = tensor == 'q'   ? setup.q
                       : tensor == 'k' ? setup.k
                       : tensor == 'v' ? setup.v
                                       : setup.dout;
  if (row >= 0) target.set(0, row, 0, 1, value);
  const RunResult result = Run(setup, cpu_backend())();
  CHECK_MESSAGE(result.error.empty(), result.error);
  return result.values;
}

bool is_finite_row(const std::vector<double>& values, int64_t row, int64_t row_size) {
  for (int64_t i = row * row_size; i < (row + 1) * row_size; ++i) {
    if (!std::isfinite(values[static_cast<size_t>(i)])) return false;
  }
  return true;
}

}  // namespace

TEST("every instruction set agrees with manual attention") {
  for_each_instruction_set([](const std::string& isa) {
    uint64_t seed = 11;
    for (const Case& spec : few_cases()) {
      for (const Dtype dtype :
           {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
        if (isa == "amx-emulated" && dtype != Dtype::kBFloat16) continue;
        for (const int head_dim : {40, 64}) {
          for (const Mask& mask : spec.masks) {
            const Setup setup = make_setup(spec, dtype, head_dim, mask, seed++);
            const RunResult result = Run(setup, cpu_backend())();
            CHECK_MESSAGE(result.error.empty(), isa + " " + setup.name() + ": " + result.error);
            const Verdict verdict = compare(setup, Truth(setup), result.values);
            CHECK_MESSAGE(verdict.passed(), isa + " " + setup.name() + verdict.text());
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
  for_each_instruction_set([&](const std::string& isa) {
    for (const Case& spec : cases) {
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
        if (isa == "amx-emulated" && dtype != Dtype::kBFloat16) continue;
        const Setup setup = make_setup(spec, dtype, 32, kCausal, 5);
        set_threads(1);
        const AttentionOutput one = Run(setup, cpu_backend())().values;
        for (const int threads : {2, 3, 8}) {
          set_threads(threads);
          CHECK_MESSAGE(identical(Run(setup, cpu_backend())().values, one),
                        isa + " " + setup.name() + ", threads " + std::to_string(threads));
        }
      }
    }
  });
  set_threads(2);
}

TEST("NaN and inf reach the rows that see them and no other") {
  const Case spec{.name = "", .heads = 1, .heads_kv = 1, .seqlen_q = 120, .seqlen_k = 150};
  constexpr int64_t kOffset = 30, kRow = 50, kDim = 24;
  for_each_instruction_set([&](const std::string& isa) {
    for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
      const Setup setup = make_setup(spec, dtype, kDim, kCausal, 3);
      for (const double value : {double{NAN}, double{INFINITY}}) {
        for (const char tensor : {'k', 'v'}) {
          const AttentionOutput r = run_with(setup, tensor, kRow + kOffset, value);
          for (int64_t i = 0; i < spec.seqlen_q; ++i) {
            const std::string where = isa + " " + tensor + " row " + std::to_string(i);
            // An infinite key whose score is -inf has weight 0: such a row may stay finite.
            if (i >= kRow && tensor == 'k' && std::isinf(value)) continue;
            CHECK_MESSAGE(is_finite_row(r.out, i, kDim) == (i < kRow), where + " out");
            CHECK_MESSAGE(is_finite_row(r.dq, i, kDim) == (i < kRow), where + " dq");
          }
        }
        for (const char tensor : {'q', 'd'}) {
          const AttentionOutput r = run_with(setup, tensor, kRow, value);
          for (int64_t i = 0; i < spec.seqlen_q; ++i) {
            const std::string where = isa + " " + tensor + " row " + std::to_string(i);
            CHECK_MESSAGE(is_finite_row(r.dq, i, kDim) == (i != kRow), where + " dq");
          }
          for (int64_t j = kRow + kOffset + 1; j < spec.seqlen_k; ++j) {
            CHECK_MESSAGE(is_finite_row(r.dk, j, kDim) && is_finite_row(r.dv, j, kDim),
                          isa + " " + tensor + " key " + std::to_string(j));
          }
        }
      }
    }
  });
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
                    .softmax_scale = 1.0f,
                    .band = {},
                    .dtype = flashtile::Dtype::kFloat32};
  params.q = params.k = params.v = {qkv.data(), 0, 32, 32};
  params.out = {large.data(), 0, 32, 32};
  flashtile::PlanName name;
  size_t bytes = 0;
  CHECK_EQ(flashtile::cpu::forward_plan(params.problem, name, bytes), FLASHTILE_OK);
  void* const workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  params.workspace = workspace;
  params.workspace_bytes = bytes;
  CHECK_EQ(flashtile::cpu::forward(params), FLASHTILE_OK);
  params.out.data = small.data();
  params.workspace_bytes = 1000;
  CHECK_EQ(flashtile::cpu::forward(params), FLASHTILE_WORKSPACE_TOO_SMALL);
  CHECK(std::strstr(flashtile_last_error(), "workspace_bytes is 1000") != nullptr);
  CHECK(small == std::vector<float>(small.size()));  // nothing was written
  size_t enough = 1000;
  while (flashtile::cpu::forward(params) != FLASHTILE_OK) params.workspace_bytes = enough += 1000;
  CHECK(enough < bytes);
  CHECK(small == large);
  std::free(workspace);
  set_threads(2);
}

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
