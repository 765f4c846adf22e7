// Every refusal of the C API: the status, the whole sentence, and that nothing was written. Each
// call is a good one with one thing broken.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../support/check.h"
#include "../support/small_call.h"

using flashtile::test::SmallCall;

namespace {

struct Refusal {
  void (*break_it)(SmallCall& call);
  flashtile_status status;
  const char* sentence;
};

constexpr flashtile_status kInvalid = FLASHTILE_INVALID_ARGUMENT;
constexpr flashtile_status kUnsupported = FLASHTILE_UNSUPPORTED;
constexpr int64_t kHuge = int64_t{1} << 40;

const Refusal kProblemRefusals[] = {
    {[](SmallCall& c) { c.forward.problem = c.backward.problem = nullptr; }, kInvalid,
     "problem is NULL; allowed: a pointer to the struct"},
    {[](SmallCall& c) { c.problem.struct_size = 0; }, kInvalid,
     "problem.struct_size is 0; allowed: 144 to 4096"},
    {[](SmallCall& c) { c.problem.struct_size = 12; }, kInvalid,
     "problem.struct_size is 12; allowed: 144 to 4096"},
    {[](SmallCall& c) { c.problem.device = 7; }, kInvalid,
     "device is 7; allowed: FLASHTILE_CPU and FLASHTILE_CUDA"},
    {[](SmallCall& c) { c.problem.device_index = -2; }, kInvalid,
     "device_index is -2; allowed: -1 on the CPU"},
    {[](SmallCall& c) { c.problem.device_index = 3; }, kInvalid,
     "device_index is 3; allowed: -1 on the CPU"},
    {[](SmallCall& c) { c.problem.dtype = 9; }, kInvalid,
     "dtype is 9; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, FLOAT64"},
    {[](SmallCall& c) { c.problem.dtype_kv = -1; }, kInvalid,
     "dtype_kv is -1; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, FLOAT64"},
    {[](SmallCall& c) { c.problem.dtype_kv = FLASHTILE_FLOAT64; }, kUnsupported,
     "dtype_kv is float64; allowed: float32, the dtype of q, float16 and bfloat16"},
    {[](SmallCall& c) { c.problem.num_threads = -1; }, kInvalid,
     "num_threads is -1; allowed: 0 to 65536"},
    {[](SmallCall& c) { c.problem.num_threads = 65537; }, kInvalid,
     "num_threads is 65537; allowed: 0 to 65536"},
    {[](SmallCall& c) { c.problem.dtype_out = FLASHTILE_BFLOAT16; }, kUnsupported,
     "dtype_out is bfloat16; allowed: float32, the dtype of q"},
    {[](SmallCall& c) { c.problem.batch = -1; }, kInvalid, "batch is -1; allowed: 0 to 2147483646"},
    {[](SmallCall& c) { c.problem.batch = kHuge; }, kInvalid,
     "batch is 1099511627776; allowed: 0 to 2147483646"},
    {[](SmallCall& c) { c.problem.seqlen_q = -4; }, kInvalid,
     "seqlen_q is -4; allowed: 0 to 2147483647"},
    {[](SmallCall& c) { c.problem.seqlen_q = kHuge; }, kInvalid,
     "seqlen_q is 1099511627776; allowed: 0 to 2147483647"},
    {[](SmallCall& c) { c.problem.seqlen_k = -1; }, kInvalid,
     "seqlen_k is -1; allowed: 0 to 2147483647"},
    {[](SmallCall& c) { c.problem.num_heads = 0; }, kInvalid,
     "num_heads is 0; allowed: 1 to 2147483647"},
    {[](SmallCall& c) { c.problem.num_heads = -8; }, kInvalid,
     "num_heads is -8; allowed: 1 to 2147483647"},
    {[](SmallCall& c) { c.problem.num_heads_kv = 0; }, kInvalid,
     "num_heads_kv is 0; allowed: 1 to 2147483647"},
    {[](SmallCall& c) { c.problem.num_heads_kv = 3; }, kInvalid,
     "num_heads_kv is 3; allowed: a divisor of num_heads, 4"},
    {[](SmallCall& c) { c.problem.num_heads_kv = 8; }, kInvalid,
     "num_heads_kv is 8; allowed: a divisor of num_heads, 4"},
    {[](SmallCall& c) { c.problem.head_dim = 0; }, kInvalid, "head_dim is 0; allowed: 1 to 65536"},
    {[](SmallCall& c) { c.problem.head_dim = -64; }, kInvalid,
     "head_dim is -64; allowed: 1 to 65536"},
    {[](SmallCall& c) { c.problem.head_dim = 65537; }, kInvalid,
     "head_dim is 65537; allowed: 1 to 65536"},
    {[](SmallCall& c) { c.problem.head_dim_v = -1; }, kInvalid,
     "head_dim_v is -1; allowed: 0 to 65536"},
    {[](SmallCall& c) { c.problem.head_dim_v = 65537; }, kInvalid,
     "head_dim_v is 65537; allowed: 0 to 65536"},
    {[](SmallCall& c) { c.problem.softmax_scale = std::nanf(""); }, kInvalid,
     "softmax_scale is nan; allowed: a finite number"},
    {[](SmallCall& c) { c.problem.softmax_scale = std::numeric_limits<float>::infinity(); },
     kInvalid, "softmax_scale is inf; allowed: a finite number"},
    {[](SmallCall& c) { c.problem.window_left = -3; }, kInvalid,
     "window_left is -3; allowed: 0 and more keys, or -1 (unlimited)"},
    {[](SmallCall& c) { c.problem.window_right = -2; }, kInvalid,
     "window_right is -2; allowed: 0 and more keys, or -1 (unlimited)"},
    {[](SmallCall& c) { c.problem.window_left = INT64_MIN; }, kInvalid,
     "window_left is -9223372036854775808; allowed: 0 and more keys, or -1 (unlimited)"},
    {[](SmallCall& c) { c.problem.alignment = 7; }, kInvalid,
     "alignment is 7; allowed: FLASHTILE_BOTTOM_RIGHT and FLASHTILE_TOP_LEFT"},
    {[](SmallCall& c) { c.problem.alignment = -1; }, kInvalid,
     "alignment is -1; allowed: FLASHTILE_BOTTOM_RIGHT and FLASHTILE_TOP_LEFT"},
    {[](SmallCall& c) { c.problem.flags = 0x30; }, kInvalid,
     "flags is 0x30; allowed: FLASHTILE_DETERMINISTIC, FLASHTILE_ZERO_SCALE"},
    {[](SmallCall& c) { c.problem.cu_seqlens_q = c.cu_q; }, kInvalid,
     "cu_seqlens_k is NULL and cu_seqlens_q is not; allowed: both NULL (dense) or both set "
     "(varlen)"},
    {[](SmallCall& c) { c.problem.cu_seqlens_k = c.cu_k; }, kInvalid,
     "cu_seqlens_q is NULL and cu_seqlens_k is not; allowed: both NULL (dense) or both set "
     "(varlen)"},
    {[](SmallCall& c) { c.make_varlen(), c.problem.total_q = -1; }, kInvalid,
     "total_q is -1; allowed: 0 to 2147483647"},
    {[](SmallCall& c) { c.make_varlen(), c.problem.total_k = kHuge; }, kInvalid,
     "total_k is 1099511627776; allowed: 0 to 2147483647"},
    {[](SmallCall& c) { c.make_varlen(), c.problem.batch = 0; }, kInvalid,
     "total_q is 8; allowed: 0 to 0"},
    {[](SmallCall& c) { c.make_varlen(), c.problem.batch = 0, c.problem.total_q = 0; }, kInvalid,
     "total_k is 12; allowed: 0 to 0"},
    {[](SmallCall& c) {
       c.problem.head_dim_v = 65536, c.problem.num_heads = 1 << 20, c.problem.seqlen_k = 1 << 20;
     },
     kInvalid,
     "batch is 2; allowed: batch * (seqlen_q + seqlen_k) * num_heads * head_dim below 2^52"},
};

// Not seen by flashtile_workspace_size, which reads no pointer.
const Refusal kCallRefusals[] = {
    {[](SmallCall& c) { c.make_varlen(), c.cu_q[0] = 1; }, kInvalid,
     "cu_seqlens_q[0] is 1; allowed: 0"},
    {[](SmallCall& c) { c.make_varlen(), c.cu_k[1] = -2; }, kInvalid,
     "cu_seqlens_k[1] is -2; allowed: at least 0, the value before it"},
    {[](SmallCall& c) { c.make_varlen(), c.cu_q[1] = 9; }, kInvalid,
     "cu_seqlens_q[2] is 8; allowed: at least 9, the value before it"},
    {[](SmallCall& c) { c.make_varlen(), c.problem.total_q = 7; }, kInvalid,
     "cu_seqlens_q[2] is 8; allowed: up to 7, the number of rows"},
    {[](SmallCall& c) { c.make_varlen(), c.cu_k[2] = 99; }, kInvalid,
     "cu_seqlens_k[2] is 99; allowed: up to 12, the number of rows"},
    {[](SmallCall& c) { c.set_seqused(), c.used_q[1] = 5; }, kInvalid,
     "seqused_q[1] is 5; allowed: 0 to 4, the rows of the sequence"},
    {[](SmallCall& c) { c.set_seqused(), c.used_k[0] = -1; }, kInvalid,
     "seqused_k[0] is -1; allowed: 0 to 6, the rows of the sequence"},
    {[](SmallCall& c) { c.make_varlen(), c.set_seqused(), c.used_k[1] = 7; }, kInvalid,
     "seqused_k[1] is 7; allowed: 0 to 6, the rows of the sequence"},
    {[](SmallCall& c) { c.make_varlen(), c.set_seqused(), c.cu_q[1] = 3; }, kInvalid,
     "seqused_q[0] is 4; allowed: 0 to 3, the rows of the sequence"},
    {[](SmallCall& c) { c.forward.q.data = c.backward.q.data = nullptr; }, kInvalid,
     "q.data is NULL; allowed: a pointer to 4 rows"},
    {[](SmallCall& c) { c.forward.k.data = c.backward.k.data = nullptr; }, kInvalid,
     "k.data is NULL; allowed: a pointer to 6 rows"},
    {[](SmallCall& c) { c.forward.v.data = c.backward.v.data = nullptr; }, kInvalid,
     "v.data is NULL; allowed: a pointer to 6 rows"},
    {[](SmallCall& c) { c.forward.out.data = c.backward.out.data = nullptr; }, kInvalid,
     "out.data is NULL; allowed: a pointer to 4 rows"},
};

const Refusal kForwardRefusals[] = {
    {[](SmallCall& c) { c.forward.lse_stride_head = 0; }, kInvalid,
     "lse_stride_head is 0 over 4 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](SmallCall& c) { c.forward.struct_size = 8; }, kInvalid,
     "params.struct_size is 8; allowed: 184 to 4096"},
    {[](SmallCall& c) { c.forward.out.stride_head = 0; }, kInvalid,
     "out.stride_head is 0 over 4 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](SmallCall& c) { c.forward.out.stride_seq = 0; }, kInvalid,
     "out.stride_seq is 0 over 4 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](SmallCall& c) { c.forward.out.stride_batch = 0; }, kInvalid,
     "out.stride_batch is 0 over 2 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
};

const Refusal kBackwardRefusals[] = {
    {[](SmallCall& c) { c.backward.struct_size = 8; }, kInvalid,
     "params.struct_size is 8; allowed: 336 to 4096"},
    {[](SmallCall& c) { c.backward.dout.data = nullptr; }, kInvalid,
     "dout.data is NULL; allowed: a pointer to 4 rows"},
    {[](SmallCall& c) { c.backward.dq.data = nullptr; }, kInvalid,
     "dq.data is NULL; allowed: a pointer to 4 rows"},
    {[](SmallCall& c) { c.backward.dk.data = nullptr; }, kInvalid,
     "dk.data is NULL; allowed: a pointer to 6 rows"},
    {[](SmallCall& c) { c.backward.dv.data = nullptr; }, kInvalid,
     "dv.data is NULL; allowed: a pointer to 6 rows"},
    {[](SmallCall& c) { c.backward.softmax_lse = nullptr; }, kInvalid,
     "softmax_lse is NULL; allowed: the softmax_lse of the forward call"},
    {[](SmallCall& c) { c.backward.dq.stride_head = 0; }, kInvalid,
     "dq.stride_head is 0 over 4 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](SmallCall& c) { c.backward.dk.stride_seq = 0; }, kInvalid,
     "dk.stride_seq is 0 over 6 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](SmallCall& c) { c.backward.dv.stride_batch = 0; }, kInvalid,
     "dv.stride_batch is 0 over 2 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
};

struct Outcome {
  flashtile_status status;
  std::string sentence;
};

Outcome forward(const SmallCall& call) {
  const flashtile_status status = flashtile_forward(&call.forward, nullptr);
  return {status, flashtile_last_error()};
}
Outcome backward(const SmallCall& call) {
  const flashtile_status status = flashtile_backward(&call.backward, nullptr);
  return {status, flashtile_last_error()};
}
Outcome can_run(const SmallCall& call) {
  char why[512] = "untouched";
  const flashtile_status status = flashtile_can_run(&call.forward, why, sizeof why);
  return {status, why};
}
Outcome can_run_backward(const SmallCall& call) {
  char why[512] = "untouched";
  const flashtile_status status = flashtile_can_run_backward(&call.backward, why, sizeof why);
  return {status, why};
}
Outcome workspace_size(const SmallCall& call) {
  size_t bytes = 12345;
  const flashtile_status status = flashtile_workspace_size(&call.forward, &bytes);
  return {status, flashtile_last_error()};
}
Outcome plan(const SmallCall& call) {
  char name[96] = "";
  const flashtile_status status = flashtile_plan_backward(&call.backward, name, sizeof name);
  return {status, flashtile_last_error()};
}
using Entry = Outcome (*)(const SmallCall&);

void check_refusal(const Refusal& refusal, Entry entry) {
  const auto call = std::make_unique<SmallCall>();
  for (float* written : {call->out, call->dq, call->dk, call->dv, call->lse}) written[0] = 42.0f;
  refusal.break_it(*call);
  const Outcome outcome = entry(*call);
  CHECK_EQ(outcome.status, refusal.status);
  CHECK_EQ(outcome.sentence, std::string(refusal.sentence));
  for (const float* written : {call->out, call->dq, call->dk, call->dv, call->lse})
    CHECK_EQ(written[0], 42.0f);
}

template <size_t kCount>
void check_all(const Refusal (&refusals)[kCount], std::initializer_list<Entry> entries) {
  for (const Refusal& refusal : refusals) {
    for (const Entry entry : entries) check_refusal(refusal, entry);
  }
}

}  // namespace

TEST("the unbroken call runs") {
  const auto call = std::make_unique<SmallCall>();
  CHECK_EQ(forward(*call).status, FLASHTILE_OK);
  CHECK_EQ(backward(*call).status, FLASHTILE_OK);
  CHECK_EQ(can_run(*call).sentence, std::string());
  call->make_varlen();
  CHECK_EQ(forward(*call).status, FLASHTILE_OK);
  CHECK_EQ(backward(*call).status, FLASHTILE_OK);
}

// Whether a backend serves them is its own matter; the checks let them pass.
TEST("admitted by the checks") {
  void (*const changes[])(SmallCall&) = {
      [](SmallCall& c) { c.problem.window_left = 0; },
      [](SmallCall& c) { c.problem.window_right = 5; },
      [](SmallCall& c) { c.problem.window_left = c.problem.window_right = INT64_MAX; },
      [](SmallCall& c) { c.problem.alignment = FLASHTILE_TOP_LEFT; },
      [](SmallCall& c) { c.problem.head_dim_v = 4; },
      [](SmallCall& c) { c.problem.head_dim_v = SmallCall::kDim; },
      [](SmallCall& c) { c.set_seqused(); },
      [](SmallCall& c) { c.make_varlen(), c.set_seqused(); },
      [](SmallCall& c) { c.make_varlen(), c.cu_q[2] = 7, c.cu_k[2] = 6; },  // rows of no sequence
  };
  for (const auto& change : changes) {
    for (const Entry entry : {can_run, can_run_backward}) {
      const auto call = std::make_unique<SmallCall>();
      change(*call);
      const Outcome outcome = entry(*call);
      CHECK_MESSAGE(outcome.status != kInvalid, outcome.sentence);
    }
  }
}

// A caller of 0.1 has a struct that ends before seqused_q; what lies behind it is not ours.
TEST("the problem of version 0.1") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.struct_size = offsetof(flashtile_problem, seqused_q);
  call->used_q[0] = 99;
  call->set_seqused();
  CHECK_EQ(forward(*call).status, FLASHTILE_OK);
  CHECK_EQ(backward(*call).status, FLASHTILE_OK);
  CHECK_EQ(can_run(*call).sentence, std::string());
  call->problem.struct_size = sizeof call->problem;
  CHECK_EQ(forward(*call).status, kInvalid);
}

TEST("problem refusals") {
  check_all(kProblemRefusals, {forward, backward, can_run, can_run_backward, workspace_size, plan});
}
TEST("call refusals") {
  check_all(kCallRefusals, {forward, backward, can_run, can_run_backward, plan});
}
TEST("forward refusals") { check_all(kForwardRefusals, {forward, can_run}); }
TEST("backward refusals") { check_all(kBackwardRefusals, {backward, can_run_backward, plan}); }

TEST("NULL params") {
  const std::string sentence = "params is NULL; allowed: a pointer to the struct";
  size_t bytes = 0;
  char text[96];
  CHECK_EQ(flashtile_forward(nullptr, nullptr), kInvalid);
  CHECK_EQ(std::string(flashtile_last_error()), sentence);
  CHECK_EQ(flashtile_backward(nullptr, nullptr), kInvalid);
  CHECK_EQ(std::string(flashtile_last_error()), sentence);
  CHECK_EQ(flashtile_can_run(nullptr, text, sizeof text), kInvalid);
  CHECK_EQ(std::string(text), sentence);
  CHECK_EQ(flashtile_can_run_backward(nullptr, nullptr, 0), kInvalid);
  CHECK_EQ(flashtile_plan(nullptr, text, sizeof text), kInvalid);
  CHECK_EQ(flashtile_plan_backward(nullptr, text, sizeof text), kInvalid);
  CHECK_EQ(flashtile_workspace_size(nullptr, &bytes), kInvalid);
  CHECK_EQ(flashtile_workspace_size_backward(nullptr, &bytes), kInvalid);
}

TEST("NULL results") {
  const auto call = std::make_unique<SmallCall>();
  CHECK_EQ(flashtile_workspace_size(&call->forward, nullptr), kInvalid);
  CHECK_EQ(std::string(flashtile_last_error()),
           std::string("bytes is NULL; allowed: a pointer to the result"));
  CHECK_EQ(flashtile_workspace_size_backward(&call->backward, nullptr), kInvalid);
  CHECK_EQ(flashtile_get_build_info(nullptr), kInvalid);
  CHECK_EQ(flashtile_plan(&call->forward, nullptr, 0), FLASHTILE_OK);  // asks whether, not what
}

TEST("a stream on the CPU") {
  const auto call = std::make_unique<SmallCall>();
  auto* const stream = reinterpret_cast<CUstream_st*>(uintptr_t{0x40});
  CHECK_EQ(flashtile_forward(&call->forward, stream), kInvalid);
  CHECK_EQ(std::string(flashtile_last_error()),
           std::string("stream is 0x40; allowed: NULL on the CPU"));
  CHECK_EQ(flashtile_backward(&call->backward, stream), kInvalid);
}

TEST("a workspace that is too small, absent or misaligned") {
  const auto call = std::make_unique<SmallCall>();
  size_t forward_bytes = 0, backward_bytes = 0;
  CHECK_EQ(flashtile_workspace_size(&call->forward, &forward_bytes), FLASHTILE_OK);
  CHECK_EQ(flashtile_workspace_size_backward(&call->backward, &backward_bytes), FLASHTILE_OK);
  CHECK(backward_bytes > 0);
  // The sentence names the least that a call runs with; one thread needs less than all of them.
  call->backward.workspace_bytes = 1;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), FLASHTILE_WORKSPACE_TOO_SMALL);
  const std::string said = flashtile_last_error(), before = "workspace_bytes is 1; allowed: ";
  CHECK_EQ(said.substr(0, before.size()), before);
  const size_t least = std::strtoull(said.c_str() + before.size(), nullptr, 10);
  CHECK(least <= backward_bytes);
  if (least < backward_bytes) {
    CHECK_EQ(said, before + std::to_string(least) +
                       ", enough for one thread, and more; flashtile_workspace_size: " +
                       std::to_string(backward_bytes));
  } else {
    CHECK_EQ(said, before + std::to_string(least) + " (flashtile_workspace_size) and more");
  }
  call->backward.workspace_bytes = least - 1;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), FLASHTILE_WORKSPACE_TOO_SMALL);
  call->backward.workspace_bytes = least;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), FLASHTILE_OK);
  call->backward.workspace_bytes = backward_bytes;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), FLASHTILE_OK);
  call->backward.workspace = nullptr;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), kInvalid);
  CHECK_EQ(std::string(flashtile_last_error()),
           "workspace is NULL; allowed: a pointer to " + std::to_string(backward_bytes) + " bytes");
  call->backward.workspace = call->workspace + 4;
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), kInvalid);
  if (forward_bytes > 0) {
    call->forward.workspace_bytes = 1;
    CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_WORKSPACE_TOO_SMALL);
  }
}

TEST("a sentence is cut at the size of its buffer") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.head_dim = 0;
  char why[12];
  std::memset(why, 'x', sizeof why);
  CHECK_EQ(flashtile_can_run(&call->forward, why, 11), kInvalid);
  CHECK_EQ(std::string(why), std::string("head_dim i"));
  CHECK_EQ(why[11], 'x');
}

// CUDA checks that come before any device is asked, or the one sentence of a build without CUDA.
TEST("CUDA without a device") {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_OK);
  const auto call = std::make_unique<SmallCall>();
  call->problem.device = FLASHTILE_CUDA;
  const Outcome outcome = forward(*call);
  if (std::string(info.cuda_architectures).empty()) {
    CHECK_EQ(outcome.status, FLASHTILE_NOT_BUILT);
    CHECK(outcome.sentence.find("this library was built without CUDA") != std::string::npos);
    return;
  }
  CHECK_EQ(outcome.status, kUnsupported);
  CHECK_EQ(outcome.sentence, std::string("dtype is float32; allowed on CUDA: float16, bfloat16"));
  call->problem.dtype = call->problem.dtype_kv = call->problem.dtype_out = FLASHTILE_FLOAT16;
  call->problem.dtype_kv = FLASHTILE_BFLOAT16;
  CHECK_EQ(forward(*call).sentence,
           std::string("dtype_kv is bfloat16; allowed: float16, the dtype of q"));
  call->problem.dtype_kv = FLASHTILE_FLOAT16;
  call->problem.num_threads = 2;
  CHECK_EQ(forward(*call).sentence, std::string("num_threads is 2; allowed on CUDA: 0"));
  call->problem.num_threads = 0;
  call->problem.batch = 1;
  call->problem.seqlen_q = INT32_MAX;
  call->forward.softmax_lse = nullptr;
  call->forward.out.data = reinterpret_cast<void*>(uintptr_t{1} << 60);  // rows of q are before it
  CHECK_EQ(forward(*call).status, kUnsupported);
  CHECK(forward(*call).sentence.find("seqlen_q is 2147483647; allowed on CUDA: 0 to ") == 0);
}
