// Workspaces of the CPU op: sized on one thread and used on another, and how they grow.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../support/check.h"
#include "../support/setup.h"
#include "flashtile/flashtile.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace flashtile::test;

namespace {

void set_threads([[maybe_unused]] int threads) {
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#endif
}

using Memory = std::unique_ptr<void, void (*)(void*)>;
Memory room(size_t bytes) { return {std::aligned_alloc(64, bytes / 64 * 64 + 64), std::free}; }

flashtile_problem problem_of(int32_t dtype, int64_t seqlen, int64_t heads, int64_t heads_kv,
                             int64_t dim) {
  flashtile_problem p = FLASHTILE_PROBLEM_INIT;
  p.dtype = p.dtype_kv = p.dtype_out = dtype;
  p.batch = 1;
  p.num_heads = heads;
  p.num_heads_kv = heads_kv;
  p.head_dim = dim;
  p.seqlen_q = p.seqlen_k = seqlen;
  return p;
}

size_t forward_bytes(const flashtile_problem& problem) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  size_t bytes = 0;
  CHECK_EQ(flashtile_workspace_size(&params, &bytes), FLASHTILE_OK);
  return bytes;
}

size_t backward_bytes(const flashtile_problem& problem) {
  flashtile_backward_params params;
  flashtile_backward_init(&params);
  params.problem = &problem;
  size_t bytes = 0;
  CHECK_EQ(flashtile_workspace_size_backward(&params, &bytes), FLASHTILE_OK);
  return bytes;
}

// Forward and backward over the same rows of fp32; every workspace is sized with `planned` threads
// and used with `used`.
struct Results {
  std::vector<float> out, lse, dq, dk, dv;
  bool operator==(const Results&) const = default;
};
Results run(const flashtile_problem& problem, int planned, int used) {
  const int64_t dim = problem.head_dim, row = problem.num_heads * dim;
  const int64_t row_kv = problem.num_heads_kv * dim;
  const auto rows = static_cast<size_t>(problem.seqlen_q);
  Normal normal(3);
  const auto numbers = [&](int64_t per_row) {
    std::vector<float> all(rows * static_cast<size_t>(per_row));
    for (float& x : all) x = static_cast<float>(normal());
    return all;
  };
  const auto view = [&](std::vector<float>& data, int64_t per_row) -> flashtile_tensor {
    return {data.data(), 0, per_row, dim};
  };
  std::vector<float> q = numbers(row), k = numbers(row_kv), v = numbers(row_kv);
  std::vector<float> dout = numbers(row);
  Results r = {q, std::vector<float>(rows * static_cast<size_t>(problem.num_heads)), q, k, v};

  flashtile_forward_params forward;
  flashtile_forward_init(&forward);
  forward.problem = &problem;
  forward.q = view(q, row);
  forward.k = view(k, row_kv);
  forward.v = view(v, row_kv);
  forward.out = view(r.out, row);
  forward.softmax_lse = r.lse.data();
  forward.lse_stride_head = problem.seqlen_q;
  set_threads(planned);
  forward.workspace_bytes = forward_bytes(problem);
  const Memory first = room(forward.workspace_bytes);
  forward.workspace = first.get();
  set_threads(used);
  CHECK_MESSAGE(flashtile_forward(&forward, nullptr) == FLASHTILE_OK, flashtile_last_error());

  flashtile_backward_params backward;
  flashtile_backward_init(&backward);
  backward.problem = &problem;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.out = forward.out;
  backward.dout = view(dout, row);
  backward.dq = view(r.dq, row);
  backward.dk = view(r.dk, row_kv);
  backward.dv = view(r.dv, row_kv);
  backward.softmax_lse = r.lse.data();
  backward.lse_stride_head = problem.seqlen_q;
  set_threads(planned);
  backward.workspace_bytes = backward_bytes(problem);
  const Memory second = room(backward.workspace_bytes);
  backward.workspace = second.get();
  set_threads(used);
  CHECK_MESSAGE(flashtile_backward(&backward, nullptr) == FLASHTILE_OK, flashtile_last_error());
  set_threads(2);
  return r;
}

// Bytes of q, k, v, out, dout.
double input_bytes(const flashtile_problem& p) {
  const double element = p.dtype == FLASHTILE_FLOAT32 ? 4 : p.dtype == FLASHTILE_FLOAT64 ? 8 : 2;
  const auto rows =
      static_cast<double>(p.cu_seqlens_q == nullptr ? p.batch * p.seqlen_q : p.total_q);
  return element * rows * static_cast<double>(p.head_dim * (3 * p.num_heads + 2 * p.num_heads_kv));
}

}  // namespace

TEST("a workspace sized with one thread runs with eight, and the other way round") {
  const flashtile_problem cases[] = {problem_of(FLASHTILE_FLOAT32, 200, 8, 8, 64),
                                     problem_of(FLASHTILE_FLOAT32, 1, 8, 2, 64),
                                     problem_of(FLASHTILE_FLOAT32, 2100, 2, 1, 16)};
  for (const flashtile_problem& problem : cases) {
    const Results one = run(problem, 1, 1);
    for (const auto& [planned, used] : {std::pair(1, 8), std::pair(8, 1), std::pair(2, 8)}) {
      CHECK_MESSAGE(run(problem, planned, used) == one,
                    "planned " + std::to_string(planned) + ", used " + std::to_string(used));
    }
  }
}

// As a thread pool does it: each thread has the OpenMP setting that it began with.
TEST("a workspace sized by a thread of another setting is enough") {
  const flashtile_problem problem = problem_of(FLASHTILE_FLOAT32, 200, 8, 8, 64);
  size_t bytes = 0;
  std::thread([&] {
    set_threads(1);
    bytes = forward_bytes(problem);
  }).join();
  flashtile_status status = FLASHTILE_DEVICE_ERROR;
  std::thread([&] {
    set_threads(8);
    std::vector<float> q(size_t{200} * 8 * 64, 0.25f), out(q.size());
    flashtile_forward_params params;
    flashtile_forward_init(&params);
    params.problem = &problem;
    params.q = params.k = params.v = {q.data(), 0, 512, 64};
    params.out = {out.data(), 0, 512, 64};
    const Memory memory = room(bytes);
    params.workspace = memory.get();
    params.workspace_bytes = bytes;
    status = flashtile_forward(&params, nullptr);
    CHECK(std::ranges::all_of(out, [](float x) { return std::abs(x - 0.25f) < 1e-6f; }));
  }).join();
  CHECK_EQ(status, FLASHTILE_OK);
}

TEST("the backward's workspace is a small multiple of the tensors, with 64 threads, too") {
  set_threads(64);
  const struct {
    const char* name;
    flashtile_problem problem;
  } cases[] = {
      {"8 heads", problem_of(FLASHTILE_FLOAT32, 65536, 8, 8, 64)},
      {"one head", problem_of(FLASHTILE_FLOAT32, 65536, 1, 1, 64)},
      {"MQA", problem_of(FLASHTILE_FLOAT32, 65536, 32, 1, 64)},
      {"GQA", problem_of(FLASHTILE_FLOAT32, 65536, 32, 8, 128)},
      {"64 heads", problem_of(FLASHTILE_FLOAT32, 16384, 64, 64, 64)},
      {"fp64", problem_of(FLASHTILE_FLOAT64, 65536, 4, 4, 64)},
      {"bf16", problem_of(FLASHTILE_BFLOAT16, 65536, 8, 8, 64)},
      {"bf16, one head", problem_of(FLASHTILE_BFLOAT16, 65536, 1, 1, 128)},
  };
  for (const auto& [name, problem] : cases) {
    const auto bytes = static_cast<double>(backward_bytes(problem));
    const double ratio = bytes / input_bytes(problem);
    std::printf("%s: %.2f GiB, %.2f times q, k, v, out, dout\n", name, bytes / 0x1p30, ratio);
    // 16-bit numbers are packed as fp32 where the processor has no instructions for them.
    const double allowed = problem.dtype == FLASHTILE_BFLOAT16 ? 3.6 : 1.8;
    CHECK_MESSAGE(ratio <= allowed, std::string(name) + ": " + std::to_string(ratio));
    flashtile_problem twice = problem;
    twice.seqlen_q = twice.seqlen_k = 2 * problem.seqlen_q;
    CHECK(static_cast<double>(backward_bytes(twice)) <= 2.01 * bytes);
    set_threads(256);
    CHECK(static_cast<double>(backward_bytes(problem)) <= 1.1 * bytes);
    set_threads(64);
  }
  set_threads(2);
}

TEST("one long sequence among many short ones does not multiply the workspace") {
  set_threads(64);
  flashtile_problem problem = problem_of(FLASHTILE_FLOAT32, 60000, 1, 1, 64);
  problem.batch = 8;
  problem.total_q = problem.total_k = 60000 + 7 * 10;
  const int32_t cu[9] = {};  // not read
  problem.cu_seqlens_q = problem.cu_seqlens_k = cu;
  const double ratio = static_cast<double>(backward_bytes(problem)) / input_bytes(problem);
  CHECK_MESSAGE(ratio <= 1.8, std::to_string(ratio));
  set_threads(2);
}

TEST("num_threads decides how many threads a call is planned for, and no bit") {
  flashtile_problem problem = problem_of(FLASHTILE_FLOAT32, 300, 4, 2, 48);
  set_threads(1);
  const size_t one = forward_bytes(problem), one_back = backward_bytes(problem);
  const Results expected = run(problem, 1, 1);
  set_threads(8);
  CHECK(forward_bytes(problem) > one && backward_bytes(problem) > one_back);
  problem.num_threads = 1;
  CHECK_EQ(forward_bytes(problem), one);
  CHECK_EQ(backward_bytes(problem), one_back);
  CHECK(run(problem, 8, 8) == expected);
  set_threads(1);
  problem.num_threads = 3;
  CHECK(forward_bytes(problem) > one && backward_bytes(problem) > one_back);
  CHECK(run(problem, 1, 1) == expected);
  set_threads(2);
}
