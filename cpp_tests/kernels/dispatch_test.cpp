// Which kernel serves a call on compute capability 9.0, and what can_run says of it: the kernels
// for sm_90a where TMA takes every tensor, else those for sm_80, and never without a word.
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "../support/check.h"
#include "kernel_cases.h"
#include "machine.h"
#include "untouched_call.h"

using namespace flashtile::test;

namespace {

struct Answer {
  std::string plan, note;
};

Answer ask(const std::function<void(Call&)>& change, int driver_version = 13000,
           ptx::Device device = ptx::kSm90) {
  Call call;
  change(call);
  device.driver_version = driver_version;
  ptx::machine().configure(device);
  char name[128] = "", note[256] = "";
  CHECK_EQ(flashtile_plan(&call.params, name, sizeof name), FLASHTILE_OK);
  CHECK_EQ(flashtile_can_run(&call.params, note, sizeof note), FLASHTILE_OK);
  return {name, note};
}

Answer ask_backward(const std::function<void(BackwardCall&)>& change) {
  BackwardCall call;
  change(call);
  ptx::machine().configure(ptx::kSm90);
  char name[128] = "", note[256] = "";
  CHECK_EQ(flashtile_plan_backward(&call.params, name, sizeof name), FLASHTILE_OK);
  CHECK_EQ(flashtile_can_run_backward(&call.params, note, sizeof note), FLASHTILE_OK);
  return {name, note};
}

void check_falls_back(const std::function<void(Call&)>& change, const std::string& obstacle) {
  const Answer answer = ask(change);
  CHECK_MESSAGE(answer.plan.find("forward_sm80_large_d") == 0, obstacle + ": " + answer.plan);
  CHECK_EQ(answer.note,
           obstacle +
               "; the kernels for sm_90a take multiples of 16 bytes and distinct rows, "
               "those for sm_80 run instead");
}

bool has_sm90() {
  for (const Schedule& schedule : schedules()) {
    if (schedule.has_sm90) return true;
  }
  return false;
}

}  // namespace

TEST("the header names kernels as they are called") {
  std::ifstream file(FLASHTILE_HEADER);
  const std::string header{std::istreambuf_iterator<char>(file), {}};
  const auto causal = [](Call& call) {
    call.problem.head_dim = call.problem.head_dim_v = 64;
    call.problem.window_right = 0;
  };
  std::vector<std::string> plans = {ask(causal, 13000, ptx::kSm80).plan};
  CHECK_EQ(plans[0], std::string("forward_sm80_large_d64_bf16_causal"));
  if (has_sm90()) plans.push_back(ask(causal).plan);
  for (const std::string& plan : plans)
    CHECK_MESSAGE(header.find("\"" + plan + "\"") != std::string::npos, "no " + plan);
}

TEST("aligned tensors are served by the kernels for sm_90a") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  const Answer plain = ask([](Call&) {});
  CHECK_EQ(plain.plan, std::string("forward_sm90_d128_bf16_full"));
  CHECK_EQ(plain.note, std::string());
  const struct {
    int64_t head_dim, head_dim_v, slice;
  } dims[] = {{8, 8, 64},      {64, 64, 64},    {72, 72, 96},    {104, 104, 128},
              {136, 136, 192}, {200, 200, 256}, {192, 128, 192}, {64, 256, 256}};
  for (const auto& [head_dim, head_dim_v, slice] : dims) {
    const Answer answer = ask([&](Call& call) {
      call.problem.head_dim = head_dim;
      call.problem.head_dim_v = head_dim_v;
      for (flashtile_tensor* tensor :
           {&call.params.q, &call.params.k, &call.params.v, &call.params.out}) {
        *tensor = {tensor->data, 256 * kHeads * kRows, 256 * kHeads, 256};
      }
    });
    CHECK_EQ(answer.plan, "forward_sm90_d" + std::to_string(slice) + "_bf16_full");
  }
}

TEST("strides of single rows, heads and batches do not matter") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  const Answer answer = ask([](Call& call) {
    call.problem.batch = 1;
    call.problem.num_heads_kv = 1;
    call.params.k.stride_batch = call.params.k.stride_head = 0;
    call.params.v.stride_batch = 7;
  });
  CHECK_EQ(answer.plan, std::string("forward_sm90_d128_bf16_full"));
}

TEST("what TMA does not take is served by the kernels for sm_80, and can_run says why") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  check_falls_back([](Call& call) { call.params.k.stride_seq = 516; }, "k.stride_seq is 516");
  check_falls_back([](Call& call) { call.params.v.stride_head = 0; }, "v.stride_head is 0");
  check_falls_back([](Call& call) { call.params.q.stride_batch = 65537; },
                   "q.stride_batch is 65537");
  check_falls_back([](Call& call) { call.params.k.stride_seq = int64_t{1} << 39; },
                   "k.stride_seq is 549755813888");
  check_falls_back(
      [](Call& call) { call.params.out.data = static_cast<char*>(call.params.out.data) + 8; },
      "out.data modulo 16 is 8");
  check_falls_back([](Call& call) { call.problem.head_dim = 100; }, "q's head dim is 100");
  check_falls_back([](Call& call) { call.problem.head_dim_v = 100; }, "v's head dim is 100");
  check_falls_back([](Call& call) { call.problem.seqlen_k = 0; }, "k's number of rows is 0");
}

TEST("the forward with scores is served by the kernels for sm_90a") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels with scores");
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  scores.softcap = 30;
  const struct {
    int64_t head_dim, slice;
  } dims[] = {{8, 64}, {64, 64}, {72, 128}, {128, 128}};
  for (const auto& [head_dim, slice] : dims) {
    const Answer answer = ask([&, dim = head_dim](Call& call) {
      call.problem.head_dim = call.problem.head_dim_v = dim;
      call.problem.scores = &scores;
    });
    CHECK_EQ(answer.plan, "forward_sm90_d" + std::to_string(slice) + "_bf16_full_scores");
    CHECK_EQ(answer.note, std::string());
  }
}

TEST("without cuTensorMapEncodeTiled the kernels for sm_80 run, and can_run says why") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  const Answer answer = ask([](Call&) {}, /*driver_version=*/11080);
  CHECK_EQ(answer.plan, std::string("forward_sm80_large_d128_bf16_full"));
  CHECK(answer.note.find("the driver has no cuTensorMapEncodeTiled") == 0);
}

TEST("other devices have no note") {
  Call call;
  ptx::machine().configure(ptx::kSm80);
  char note[256] = "unset";
  if (flashtile_can_run(&call.params, note, sizeof note) == FLASHTILE_NOT_BUILT) SKIP(note);
  CHECK_EQ(flashtile_can_run(&call.params, note, sizeof note), FLASHTILE_OK);
  CHECK_EQ(std::string(note), std::string());
}

namespace {

size_t workspace(const std::function<void(BackwardCall&)>& change) {
  BackwardCall call;
  change(call);
  size_t bytes = 0;
  CHECK_EQ(flashtile_workspace_size_backward(&call.params, &bytes), FLASHTILE_OK);
  return bytes;
}

}  // namespace

TEST("the backward of aligned tensors is served by the kernels for sm_90a") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  const struct {
    int64_t head_dim, slice;
  } dims[] = {{8, 64}, {64, 64}, {72, 96}, {128, 128}, {136, 192}, {200, 256}};
  for (const auto& [head_dim, slice] : dims) {
    const Answer answer = ask_backward([&, dim = head_dim](BackwardCall& call) {
      call.problem.head_dim = call.problem.head_dim_v = dim;
      flashtile_backward_params& p = call.params;
      for (flashtile_tensor* tensor : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
        *tensor = {tensor->data, 256 * kHeads * kRows, 256 * kHeads, 256};
    });
    CHECK_EQ(answer.plan, "backward_sm90_d" + std::to_string(slice) + "_bf16_full");
    CHECK_EQ(answer.note, std::string());
  }
}

TEST("the backward with scores is served by the kernels for sm_90a, and its note is TMA's") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  if (scores_slice_of(64) == 0) SKIP("this build has no kernels with scores");
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  scores.softcap = 30;
  const struct {
    int64_t head_dim, slice;
  } dims[] = {{8, 64}, {64, 64}, {72, 128}, {128, 128}, {136, 256}, {256, 256}};
  for (const auto& [head_dim, slice] : dims) {
    const auto with_scores = [&, dim = head_dim](BackwardCall& call) {
      call.problem.scores = &scores;
      call.problem.head_dim = call.problem.head_dim_v = dim;
      flashtile_backward_params& p = call.params;
      for (flashtile_tensor* tensor : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
        *tensor = {tensor->data, 256 * kHeads * kRows, 256 * kHeads, 256};
    };
    const Answer answer = ask_backward(with_scores);
    CHECK_EQ(answer.plan, "backward_sm90_d" + std::to_string(slice) + "_bf16_full_scores");
    CHECK_EQ(answer.note, std::string());
    const auto odd_dout = [&](BackwardCall& call) {
      with_scores(call);
      call.params.dout.stride_seq += 4;
    };
    const Answer odd = ask_backward(odd_dout);
    CHECK_EQ(odd.plan, "backward_sm80_large_d" + std::to_string(slice) + "_bf16_full_scores");
    CHECK(odd.note.find("dout.stride_seq is 1028; ") == 0);
    CHECK_EQ(workspace(odd_dout), workspace(with_scores));
  }
}

TEST("only q, k, v and dout of a backward have to be what TMA takes") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  const Answer odd_results = ask_backward([](BackwardCall& call) {
    for (flashtile_tensor* tensor : {&call.params.out, &call.params.dq, &call.params.dk})
      tensor->data = static_cast<char*>(tensor->data) + 2;
  });
  CHECK_EQ(odd_results.plan, std::string("backward_sm90_d128_bf16_full"));
  const Answer odd_dout =
      ask_backward([](BackwardCall& call) { call.params.dout.stride_seq = 516; });
  CHECK_EQ(odd_dout.plan, std::string("backward_sm80_large_d128_bf16_full"));
  CHECK(odd_dout.note.find("dout.stride_seq is 516; ") == 0);
}

TEST("the backward's workspace does not depend on which kernels serve it") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  ptx::machine().configure(ptx::kSm90);
  const size_t plain = workspace([](BackwardCall&) {});
  CHECK_EQ(workspace([](BackwardCall& call) { call.params.dout.stride_seq = 516; }), plain);
  CHECK(plain > 0);
}

namespace {

// A call over a cache of `capacity` rows for each of two sequences.
Call cache_call(int64_t queries, int64_t capacity) {
  Call call;
  call.problem.head_dim = call.problem.head_dim_v = 64;
  call.problem.num_heads_kv = 1;
  call.problem.seqlen_q = queries;
  call.problem.page_size = capacity;
  call.problem.num_pages = kBatch;
  call.params.problem = nullptr;  // plan_of() sets it, for its own copy
  return call;
}

std::string plan_of(Call call) {
  call.params.problem = &call.problem;
  char name[128] = "", note[256] = "unset";
  if (flashtile_plan(&call.params, name, sizeof name) != FLASHTILE_OK)
    return flashtile_last_error();
  CHECK_EQ(flashtile_can_run(&call.params, note, sizeof note), FLASHTILE_OK);
  CHECK_EQ(std::string(note), std::string());
  return name;
}

}  // namespace

TEST("a cache: decoding up to 64 queries times heads of a group, on 9.0 too, without a note") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  for (const ptx::Device* device : {&ptx::kSm80, &ptx::kSm90}) {
    ptx::machine().configure(*device);
    CHECK_EQ(plan_of(cache_call(1, 500)), std::string("decode_sm80_large_d64_bf16_full"));
    CHECK_EQ(plan_of(cache_call(16, 500)), std::string("decode_sm80_large_d64_bf16_full"));
    if (device == &ptx::kSm80)
      CHECK_EQ(plan_of(cache_call(17, 500)), std::string("forward_sm80_large_d64_bf16_full"));
    Call packed = cache_call(0, 500);
    const int32_t rows[3] = {};
    packed.problem.cu_seqlens_q = rows;
    packed.problem.total_q = 200;  // of any number of sequences
    CHECK_EQ(plan_of(packed), std::string("decode_sm80_large_d64_bf16_full"));
  }
}

namespace {

// Note of a call with more queries than decoding serves.
std::string note_of_prefill(const std::function<void(Call&)>& change) {
  Call call = cache_call(100, 512);
  change(call);
  call.params.problem = &call.problem;
  ptx::machine().configure(ptx::kSm90);
  char note[256] = "unset";
  CHECK_EQ(flashtile_can_run(&call.params, note, sizeof note), FLASHTILE_OK);
  return note;
}

}  // namespace

TEST("a cache: more queries are served by the kernels for sm_90a, and can_run says how") {
  if (!has_sm90()) SKIP("this build has no kernels for sm_90a");
  static const int32_t numbers[8] = {};
  const auto paged = [](int64_t page_size) {
    return [page_size](Call& call) {
      call.problem.page_size = page_size;
      call.problem.block_table = numbers;
      call.problem.max_blocks = 4;
    };
  };
  ptx::machine().configure(ptx::kSm90);
  CHECK_EQ(plan_of(cache_call(100, 500)), std::string("forward_sm90_d64_bf16_full"));
  for (const int page_size : {8, 16, 48, 1000})
    CHECK_EQ(note_of_prefill(paged(page_size)), std::string());
  const std::string rows =
      "; TMA takes pages of a multiple of 8 rows and no cache_leftpad, rows of k and v are copied "
      "one by one instead";
  CHECK_EQ(note_of_prefill(paged(7)), "page_size is 7" + rows);
  CHECK_EQ(note_of_prefill([](Call& call) { call.problem.cache_leftpad = numbers; }),
           "cache_leftpad is given" + rows);
  CHECK_EQ(note_of_prefill([](Call& call) {
             call.problem.num_pages = 0;
             call.problem.cache_batch_idx = numbers;
           }),
           "num_pages is 0" + rows);
  CHECK_EQ(note_of_prefill([](Call& call) { call.params.k.stride_seq = 516; }),
           std::string("k.stride_seq is 516; the kernels for sm_90a take multiples of 16 bytes and "
                       "distinct rows, those for sm_80 run instead"));
}

TEST("a cache that is too long for CUDA, and too many heads, are refused") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  ptx::machine().configure(ptx::kSm80);
  CHECK_EQ(plan_of(cache_call(1, int64_t{1} << 30)),
           std::string("page_size is 1073741824; allowed on CUDA: 0 to 1073741312"));
  Call paged = cache_call(1, 1 << 10);
  const int32_t table[2] = {};
  paged.problem.block_table = table;
  paged.problem.max_blocks = 1 << 20;
  CHECK_EQ(plan_of(paged),
           std::string("page_size * max_blocks is 1073741824; allowed on CUDA: 0 to 1073741312"));
  Call many = cache_call(64, 100);  // 128 rows to merge for every four heads
  many.problem.num_heads = many.problem.num_heads_kv = 500'000'000;
  many.problem.head_dim = many.problem.head_dim_v = 1;
  CHECK_EQ(plan_of(many),
           std::string("num_heads is 500000000 for 2 sequences in a cache; allowed on CUDA: up to "
                       "2147483647 thread blocks, not 16000000000"));
}

namespace {

// A dense call; every head has keys of its own unless `group` of them share some.
Call dense_call(int64_t queries, int64_t keys, int64_t group = 1) {
  Call call = cache_call(queries, 0);
  call.problem.page_size = call.problem.num_pages = 0;
  call.problem.num_heads_kv = kHeads / group;
  call.problem.seqlen_k = keys;
  return call;
}

// The first word of the plan: "decode" or "forward".
std::string kernel_of(const Call& call) {
  const std::string plan = plan_of(call);
  return plan.substr(0, plan.find('_'));
}

size_t forward_workspace(Call call) {
  call.params.problem = &call.problem;
  size_t bytes = 1;
  CHECK_EQ(flashtile_workspace_size(&call.params, &bytes), FLASHTILE_OK);
  return bytes;
}

const std::string kDecode = "decode", kForward = "forward";

}  // namespace

TEST("dense tensors: decoding of few queries over many keys, on 9.0 too, without a note") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  for (const ptx::Device* device : {&ptx::kSm80, &ptx::kSm90}) {
    ptx::machine().configure(*device);
    CHECK_EQ(plan_of(dense_call(1, 512)), std::string("decode_sm80_large_d64_bf16_full"));
    CHECK_EQ(kernel_of(dense_call(1, 511)), kForward);
    CHECK_EQ(kernel_of(dense_call(4, 1024, 4)), kDecode);
    CHECK_EQ(kernel_of(dense_call(4, 1023, 4)), kForward);
    CHECK_EQ(kernel_of(dense_call(64, 4096)), kDecode);
    CHECK_EQ(kernel_of(dense_call(16, 4096, 4)), kDecode);
    CHECK_EQ(kernel_of(dense_call(17, 1 << 20, 4)), kForward);
    CHECK_EQ(kernel_of(dense_call(65, 1 << 20)), kForward);
    Call unaligned = dense_call(1, 512);
    unaligned.params.k.stride_seq =
        516;  // nothing that TMA takes, and nothing that it is asked for
    CHECK_EQ(kernel_of(unaligned), kDecode);
    Call packed = dense_call(1, 4096);
    const int32_t rows[3] = {};
    packed.problem.cu_seqlens_q = packed.problem.cu_seqlens_k = rows;
    packed.problem.total_q = 2;
    packed.problem.total_k = 8192;
    CHECK_EQ(kernel_of(packed), kForward);
  }
}

TEST("dense tensors: only keys that some query sees count") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  ptx::machine().configure(ptx::kSm80);
  const struct {
    int64_t left, right;
    int32_t alignment;
    std::string kernel;
  } masks[] = {
      {-1, 0, FLASHTILE_BOTTOM_RIGHT, kDecode},  {-1, 0, FLASHTILE_TOP_LEFT, kForward},
      {510, 0, FLASHTILE_BOTTOM_RIGHT, kDecode}, {509, 0, FLASHTILE_BOTTOM_RIGHT, kForward},
      {0, -1, FLASHTILE_BOTTOM_RIGHT, kForward}, {0, -1, FLASHTILE_TOP_LEFT, kDecode},
      {-1, 510, FLASHTILE_TOP_LEFT, kDecode},    {-1, 509, FLASHTILE_TOP_LEFT, kForward}};
  for (const auto& mask : masks) {
    Call call = dense_call(2, 4096);
    call.problem.window_left = mask.left;
    call.problem.window_right = mask.right;
    call.problem.alignment = mask.alignment;
    CHECK_EQ(kernel_of(call), mask.kernel);
  }
}

TEST("dense tensors: the workspace is that of the same rows in a cache, and nothing otherwise") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  ptx::machine().configure(ptx::kSm90);
  Call cache = cache_call(2, 1000);
  cache.problem.num_heads_kv = kHeads;
  CHECK_EQ(forward_workspace(dense_call(2, 1000)), forward_workspace(cache));
  CHECK(forward_workspace(dense_call(2, 1000)) > 0);
  CHECK_EQ(forward_workspace(dense_call(65, 1000)), size_t{0});
  // At most about a quarter of k and v.
  const size_t most = forward_workspace(dense_call(64, 4096));
  CHECK(most < size_t{kBatch} * kHeads * 4096 * (64 + 64) * 2 / 100 * 27);
}

TEST("dense tensors: what would take decoding too many thread blocks, the forward's loop serves") {
  if (slice_of(64) != 64) SKIP("this build has no kernels of head dim 64");
  ptx::machine().configure(ptx::kSm80);
  Call call = dense_call(33, 4096);  // 66 rows to merge for every four heads
  call.problem.head_dim = call.problem.head_dim_v = 1;
  const auto kernel_for = [&](int64_t heads) {
    call.problem.num_heads = call.problem.num_heads_kv = heads;
    for (flashtile_tensor* tensor :
         {&call.params.q, &call.params.k, &call.params.v, &call.params.out})
      *tensor = {tensor->data, 4096 * heads, heads, 1};
    return kernel_of(call);
  };
  CHECK_EQ(kernel_for(130'000'000), kDecode);
  CHECK_EQ(kernel_for(131'000'000), kForward);
}
