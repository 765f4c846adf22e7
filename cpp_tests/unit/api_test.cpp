// The C API's promises around the call: versions of structs, threads, names, build information.
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../support/check.h"
#include "../support/small_call.h"

using flashtile::test::SmallCall;

namespace {

// A problem as a later version declares it: ours and then 16 bytes that we do not know.
struct LaterProblem {
  flashtile_problem ours;
  int64_t appended[2];
};

}  // namespace

TEST("a later struct with unknown fields zero runs") {
  const auto call = std::make_unique<SmallCall>();
  LaterProblem later = {call->problem, {0, 0}};
  later.ours.struct_size = sizeof later;
  call->forward.problem = &later.ours;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_OK);
}

TEST("a later struct with an unknown field set is refused") {
  const auto call = std::make_unique<SmallCall>();
  LaterProblem later = {call->problem, {0, 1}};
  later.ours.struct_size = sizeof later;
  call->forward.problem = &later.ours;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_UNSUPPORTED);
  CHECK_EQ(std::string(flashtile_last_error()),
           "problem.struct_size is " + std::to_string(sizeof later) + " and a field past byte " +
               std::to_string(sizeof(flashtile_problem)) +
               " is set; allowed: fields of version 0.2.0");
}

TEST("struct_size 0 is refused") {
  const auto call = std::make_unique<SmallCall>();
  call->forward.struct_size = 0;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_INVALID_ARGUMENT);
}

TEST("init functions and the macro agree") {
  flashtile_problem macro = FLASHTILE_PROBLEM_INIT, function;
  std::memset(&function, 0xff, sizeof function);
  flashtile_problem_init(&function);
  CHECK_EQ(function.struct_size, macro.struct_size);
  CHECK_EQ(function.window_left, FLASHTILE_UNLIMITED);
  CHECK_EQ(function.window_right, FLASHTILE_UNLIMITED);
  CHECK_EQ(function.device_index, -1);
  CHECK_EQ(function.batch, 0);
  CHECK(function.cu_seqlens_q == nullptr);
  flashtile_forward_params forward;
  flashtile_forward_init(&forward);
  CHECK_EQ(forward.struct_size, sizeof forward);
  CHECK(forward.problem == nullptr && forward.softmax_lse == nullptr &&
        forward.workspace == nullptr);
  flashtile_backward_params backward;
  flashtile_backward_init(&backward);
  CHECK_EQ(backward.struct_size, sizeof backward);
  CHECK(backward.dsoftmax_lse == nullptr);
}

TEST("each thread has its own last error") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.head_dim = 0;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_INVALID_ARGUMENT);
  const std::string here = flashtile_last_error();
  std::string at_first, after;
  std::thread other([&] {
    const auto second = std::make_unique<SmallCall>();
    at_first = flashtile_last_error();
    second->problem.batch = -1;
    if (flashtile_forward(&second->forward, nullptr) != FLASHTILE_OK)
      after = flashtile_last_error();
  });
  other.join();
  CHECK_EQ(at_first, std::string());
  CHECK_EQ(after, std::string("batch is -1; allowed: 0 to 2147483646"));
  CHECK_EQ(std::string(flashtile_last_error()), here);
}

TEST("calls from many threads give the same result") {
  const auto expected = std::make_unique<SmallCall>();
  const auto fill = [](SmallCall& call) {
    for (size_t i = 0; i < std::size(call.q); ++i) call.q[i] = static_cast<float>(i % 7) - 3.0f;
    for (size_t i = 0; i < std::size(call.k); ++i) call.k[i] = static_cast<float>(i % 5) - 2.0f;
    for (size_t i = 0; i < std::size(call.v); ++i) call.v[i] = static_cast<float>(i % 11) - 5.0f;
  };
  fill(*expected);
  CHECK_EQ(flashtile_forward(&expected->forward, nullptr), FLASHTILE_OK);
  std::vector<int> same(4, 0);
  std::vector<std::thread> threads;
  threads.reserve(same.size());
  for (size_t t = 0; t < same.size(); ++t) {
    threads.emplace_back([&, t] {
      const auto call = std::make_unique<SmallCall>();
      fill(*call);
      same[t] = 1;
      for (int repeat = 0; repeat < 50; ++repeat) {
        std::memset(call->out, 0xff, sizeof call->out);
        same[t] = same[t] != 0 && flashtile_forward(&call->forward, nullptr) == FLASHTILE_OK &&
                  std::memcmp(call->out, expected->out, sizeof call->out) == 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int ok : same) CHECK_EQ(ok, 1);
}

TEST("plan names the kernel") {
  const auto call = std::make_unique<SmallCall>();
  char name[96] = "";
  CHECK_EQ(flashtile_plan(&call->forward, name, sizeof name), FLASHTILE_OK);
  CHECK_EQ(std::string(name).rfind("decode_cpu_", 0), size_t{0});  // few rows of queries
  CHECK(std::string(name).find("fp32") != std::string::npos);
  call->problem.batch = 1;
  call->problem.seqlen_q = 1000;
  std::vector<std::vector<float>> rows(5, std::vector<float>(32000));
  call->forward.q.data = call->backward.q.data = rows[0].data();
  call->forward.out.data = call->backward.out.data = rows[1].data();
  call->forward.softmax_lse = rows[2].data();
  call->forward.lse_stride_head = call->backward.lse_stride_head = 1000;
  call->backward.softmax_lse = rows[2].data();
  call->backward.dout.data = rows[3].data();
  call->backward.dq.data = rows[4].data();
  CHECK_EQ(flashtile_plan(&call->forward, name, sizeof name), FLASHTILE_OK);
  CHECK_EQ(std::string(name).rfind("forward_cpu_", 0), size_t{0});
  CHECK_EQ(flashtile_plan_backward(&call->backward, name, sizeof name), FLASHTILE_OK);
  CHECK_EQ(std::string(name).rfind("backward_cpu_", 0), size_t{0});
}

TEST("empty problems are accepted with NULL tensors and write nothing but empty rows") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.batch = 0;
  call->forward.q.data = call->forward.k.data = call->forward.v.data = call->forward.out.data =
      nullptr;
  call->forward.softmax_lse = nullptr;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_OK);
  call->problem.batch = SmallCall::kBatch;
  call->problem.seqlen_k = 0;
  call->forward.q.data = call->q;
  call->forward.out.data = call->out;
  call->out[5] = 42.0f;
  CHECK_EQ(flashtile_forward(&call->forward, nullptr), FLASHTILE_OK);
  CHECK_EQ(call->out[5], 0.0f);
}

TEST("version and build information") {
  CHECK_EQ(std::string(flashtile_version()), std::string("0.2.0"));
  flashtile_build_info info = {};
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_INVALID_ARGUMENT);
  info.struct_size = sizeof info;
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_OK);
  CHECK_EQ(std::string(info.version), std::string(flashtile_version()));
  const std::string all = info.cpu_instruction_sets, used = info.cpu_instruction_set_used;
  CHECK(all.find("portable") != std::string::npos);
  CHECK(all.find(used) != std::string::npos && !used.empty());
  CHECK_EQ(std::string(info.cuda_architectures).empty(), std::string(info.cuda_head_dims).empty());
}

TEST("every status has a name") {
  std::vector<std::string> names;
  for (int status = FLASHTILE_OK; status <= FLASHTILE_DEVICE_ERROR; ++status) {
    names.emplace_back(flashtile_status_string(static_cast<flashtile_status>(status)));
  }
  for (size_t i = 0; i < names.size(); ++i) {
    CHECK(!names[i].empty());
    for (size_t j = 0; j < i; ++j) CHECK(names[i] != names[j]);
  }
  CHECK_EQ(std::string(flashtile_status_string(static_cast<flashtile_status>(99))),
           std::string("unknown status"));
}
