// What the C API sees of tensors in memory: overlaps and misalignment. Nothing is computed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../support/check.h"
#include "../support/small_call.h"
#include "flashtile/flashtile.h"

using namespace flashtile::test;

namespace {

std::string said(const flashtile_forward_params& params) {
  char why[256] = "";
  const flashtile_status can = flashtile_can_run(&params, why, sizeof why);
  const flashtile_status ran = can == FLASHTILE_OK ? can : flashtile_forward(&params, nullptr);
  return can == ran ? why : "can_run and the call differ";
}
std::string said(const flashtile_backward_params& params) {
  char why[256] = "";
  const flashtile_status can = flashtile_can_run_backward(&params, why, sizeof why);
  const flashtile_status ran = can == FLASHTILE_OK ? can : flashtile_backward(&params, nullptr);
  return can == ran ? why : "can_run and the call differ";
}

std::string shares(const std::string& written, const std::string& other) {
  return written + " shares memory with " + other + "; allowed: memory of its own";
}

void move(flashtile_tensor& tensor, int64_t elements) {
  tensor.data = static_cast<float*>(tensor.data) + elements;
}

}  // namespace

TEST("what is written lies in nothing else") {
  const auto fresh = [] { return std::make_unique<SmallCall>(); };
  for (const int64_t offset : {0, 8, 40}) {
    auto call = fresh();
    call->forward.out.data = call->q;
    move(call->forward.out, offset);
    CHECK_EQ(said(call->forward), shares("out", "q"));
    call = fresh();
    call->forward.out.data = call->v;
    move(call->forward.v, offset);
    CHECK_EQ(said(call->forward), shares("out", "v"));
    call = fresh();
    call->backward.dv = call->backward.dk;
    move(call->backward.dv, offset);
    CHECK_EQ(said(call->backward), shares("dk", "dv"));
    call = fresh();
    call->backward.dq.data = call->dout;
    CHECK_EQ(said(call->backward), shares("dq", "dout"));
  }
  auto call = fresh();
  call->forward.softmax_lse = call->out;
  CHECK_EQ(said(call->forward), shares("out", "softmax_lse"));
  call = fresh();
  call->backward.dk.data = call->lse;
  CHECK_EQ(said(call->backward), shares("dk", "softmax_lse"));
  call = fresh();  // what is read may be one
  call->forward.v = call->forward.k;
  CHECK_EQ(said(call->forward), std::string());
  call->backward.dsoftmax_lse = call->lse;
  call->backward.dlse_stride_batch = call->backward.lse_stride_batch;
  call->backward.dlse_stride_head = call->backward.lse_stride_head;
  call->backward.dout = call->backward.out;
  CHECK_EQ(said(call->backward), std::string());
}

TEST("rows that are written do not lie in each other") {
  const auto call = std::make_unique<SmallCall>();
  const auto refused = [](const char* name, int64_t stride, int64_t entries) {
    return std::string(name) + " is " + std::to_string(stride) + " over " +
           std::to_string(entries) +
           " entries, which share memory; allowed: strides that keep them apart, they are written";
  };
  const flashtile_tensor good = call->forward.out;
  call->forward.out.stride_head = 4;  // rows of 8
  CHECK_EQ(said(call->forward), refused("out.stride_head", 4, 4));
  call->forward.out.stride_head = -7;
  CHECK_EQ(said(call->forward), refused("out.stride_head", 7, 4));
  call->forward.out = good;
  call->forward.out.stride_seq = 24;  // the fourth head of a row is the first of the next
  CHECK_EQ(said(call->forward), refused("out.stride_seq", 24, 4));
  call->forward.out = good;
  call->forward.lse_stride_head = 3;
  CHECK_EQ(said(call->forward), refused("lse_stride_head", 3, 4));
}

TEST("data that is not aligned to its numbers") {
  const auto call = std::make_unique<SmallCall>();
  auto* const off = reinterpret_cast<char*>(call->q) + 2;
  char text[128];
  std::snprintf(text, sizeof text, " is %p; allowed: a multiple of 4, a number's size",
                static_cast<void*>(off));
  call->forward.q.data = call->backward.dq.data = off;
  CHECK_EQ(said(call->forward), std::string("q.data") + text);
  CHECK_EQ(said(call->backward), std::string("dq.data") + text);
  call->forward.q.data = call->q;
  call->forward.softmax_lse = reinterpret_cast<float*>(off);
  CHECK_EQ(said(call->forward), std::string("softmax_lse") + text);
}

TEST("slices of one buffer that interleave are accepted") {
  // q, k, v, out of every token, or of every head, behind each other.
  constexpr int64_t kRows = 5, kHeads = 3, kDim = 8, kAll = kRows * kHeads * 4 * kDim;
  std::vector<float> buffer(2 * kAll), lse(2 * kRows * kHeads);
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.batch = 2;
  problem.num_heads = problem.num_heads_kv = kHeads;
  problem.head_dim = kDim;
  problem.seqlen_q = problem.seqlen_k = kRows;
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.softmax_lse = lse.data();
  params.lse_stride_batch = kRows * kHeads;
  params.lse_stride_head = kRows;
  std::vector<char> workspace(size_t{1} << 20);
  params.workspace = workspace.data() + 64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64;
  params.workspace_bytes = workspace.size() - 64;
  for (const bool per_head : {false, true}) {
    const int64_t step = per_head ? kDim : kHeads * kDim, head = per_head ? 4 * kDim : kDim;
    const auto slice = [&](int64_t i) -> flashtile_tensor {
      return {buffer.data() + i * step, kAll, kHeads * 4 * kDim, head};
    };
    params.q = slice(0);
    params.k = slice(1);
    params.v = slice(2);
    params.out = slice(3);
    CHECK_EQ(said(params), std::string());
    params.out = slice(0);
    CHECK_EQ(said(params), shares("out", "q"));
  }
}

namespace {

// All numbers of a tensor, as offsets from an origin.
std::vector<int64_t> numbers_of(const flashtile_tensor& t, const float* origin,
                                const flashtile_problem& p, int64_t heads) {
  std::vector<int64_t> all;
  const int64_t start = static_cast<float*>(t.data) - origin;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t s = 0; s < p.seqlen_q; ++s) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < p.head_dim; ++d)
          all.push_back(start + b * t.stride_batch + s * t.stride_seq + h * t.stride_head + d);
      }
    }
  }
  return all;
}

}  // namespace

// Against every pair of numbers: what is refused does overlap, and what does is mostly refused.
TEST("random strides: a refusal is never wrong") {
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) {
    return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1));
  };
  std::vector<float> memory(4096), apart(4096);
  int refused = 0, overlapping = 0;
  for (int i = 0; i < 5000; ++i) {
    flashtile_problem p = FLASHTILE_PROBLEM_INIT;
    p.dtype = p.dtype_kv = p.dtype_out = FLASHTILE_FLOAT32;
    p.batch = draw(1, 3);
    p.seqlen_q = p.seqlen_k = draw(1, 3);
    p.num_heads = p.num_heads_kv = draw(1, 3);
    p.head_dim = draw(1, 4);
    flashtile_forward_params params;
    flashtile_forward_init(&params);
    params.problem = &p;
    const auto tensor = [&](bool written) -> flashtile_tensor {
      flashtile_tensor t = {memory.data() + 2048 + draw(-40, 40), draw(-30, 60), draw(-12, 24),
                            draw(-6, 12)};
      if (written && draw(0, 2) > 0) {  // of the usual form
        t.stride_head = p.head_dim + draw(0, 2);
        t.stride_seq = t.stride_head * p.num_heads + draw(0, 3);
        t.stride_batch = t.stride_seq * p.seqlen_q + draw(0, 3);
      }
      return t;
    };
    params.q = tensor(draw(0, 1) == 0);
    params.k = params.v = {apart.data(), 0, 0, 0};
    params.out = tensor(true);
    std::vector<int64_t> out = numbers_of(params.out, memory.data(), p, p.num_heads);
    std::ranges::sort(out);
    bool overlaps = std::ranges::adjacent_find(out) != out.end();
    for (const int64_t at : numbers_of(params.q, memory.data(), p, p.num_heads))
      overlaps = overlaps || std::ranges::binary_search(out, at);
    const bool is_refused = flashtile_can_run(&params, nullptr, 0) != FLASHTILE_OK;
    CHECK(overlaps || !is_refused);
    refused += is_refused ? 1 : 0;
    overlapping += overlaps ? 1 : 0;
  }
  std::printf("%d of %d overlaps are refused\n", refused, overlapping);
  CHECK(refused > overlapping / 2);
  CHECK(overlapping < 4750);
}
