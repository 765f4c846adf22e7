// The compiled CUDA kernels, forward and backward, against manual attention in fp64: the case table
// of cases.h, on every slice and device model, each under two of the model's schedules.
// matrix_test.cpp combines the features; here are the shapes at block edges, values and rows in
// use. One test is one process that runs dozens of cases, because loading the kernels takes longer
// than running one.
#include <algorithm>

#include "../support/cases.h"
#include "../support/check.h"
#include "kernel_cases.h"

using namespace flashtile::test;

namespace {

// The same tensor from the other end of its memory: every stride negative.
HostTensor backwards(const HostTensor& tensor, Dtype dtype) {
  const Extents& e = tensor.extents();
  const Strides& s = tensor.strides();
  HostTensor other(dtype, e, Strides{-s.batch, -s.seq, -s.head},
                   (e.batch - 1) * s.batch + (e.seq - 1) * s.seq + (e.heads - 1) * s.head);
  tensor.for_each([&](int64_t b, int64_t row, int64_t head, int64_t d) {
    other.set(b, row, head, d, tensor.get(b, row, head, d));
  });
  return other;
}

void run_backwards(const Case& spec, Dtype dtype) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  ErrorTable table;
  const auto draw = [&](uint64_t seed) {
    Setup setup = make_setup(spec, dtype, 64, kCausal, seed);
    for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v, &setup.dout})
      *tensor = backwards(*tensor, dtype);
    return std::pair(setup, Truth(setup));
  };
  run_case(1, draw, cuda_backend(), table);
}

// Sequence 1 of a setup, alone.
Setup second_alone(const Setup& all) {
  Case spec = all.spec;
  spec.batch = 1;
  Setup one = make_setup(spec, all.dtype, {all.head_dim, all.head_dim_v}, all.mask);
  const auto copy = [](HostTensor& to, const HostTensor& from) {
    to.for_each([&](int64_t, int64_t row, int64_t head, int64_t d) {
      to.set(0, row, head, d, from.get(1, row, head, d));
    });
  };
  copy(one.q, all.q);
  copy(one.k, all.k);
  copy(one.v, all.v);
  return one;
}

}  // namespace

TEST("shapes fp16 d64") { run_cases(shape_cases(), Dtype::kFloat16, 64); }
TEST("shapes fp16 d128") { run_cases(shape_cases(), Dtype::kFloat16, 128); }
TEST("shapes bf16 d64") { run_cases(shape_cases(), Dtype::kBFloat16, 64); }
TEST("shapes bf16 d128") { run_cases(shape_cases(), Dtype::kBFloat16, 128); }
TEST("options fp16 d64") { run_cases(option_cases(), Dtype::kFloat16, 64); }
TEST("options fp16 d128") { run_cases(option_cases(), Dtype::kFloat16, 128); }
TEST("options bf16 d64") { run_cases(option_cases(), Dtype::kBFloat16, 64); }
TEST("options bf16 d128") { run_cases(option_cases(), Dtype::kBFloat16, 128); }
TEST("varlen fp16 d64") { run_cases(varlen_cases(), Dtype::kFloat16, 64); }
TEST("varlen fp16 d128") { run_cases(varlen_cases(), Dtype::kFloat16, 128); }
TEST("varlen bf16 d64") { run_cases(varlen_cases(), Dtype::kBFloat16, 64); }
TEST("varlen bf16 d128") { run_cases(varlen_cases(), Dtype::kBFloat16, 128); }
TEST("windows fp16 d64") { run_cases(window_cases(), Dtype::kFloat16, 64); }
TEST("windows bf16 d128") { run_cases(window_cases(), Dtype::kBFloat16, 128); }
TEST("windows bf16 d256") { run_cases(window_cases(), Dtype::kBFloat16, 256); }
TEST("in use fp16 d64") { run_cases(used_cases(), Dtype::kFloat16, 64); }
TEST("in use bf16 d128") { run_cases(used_cases(), Dtype::kBFloat16, 128); }
TEST("in use fp16 d192") { run_cases(used_cases(), Dtype::kFloat16, 192); }
TEST("few queries fp16 d64") { run_cases(few_query_cases(), Dtype::kFloat16, 64); }
TEST("few queries bf16 d72/96") { run_cases(few_query_cases(), Dtype::kBFloat16, {72, 96}); }
TEST("few queries bf16 d33/20") { run_cases(few_query_cases(), Dtype::kBFloat16, {33, 20}); }
TEST("negative strides") {
  for (const int keys : {130, 600}) {  // the second by the kernels for few queries
    const Case spec = {.name = "backwards",
                       .batch = 2,
                       .heads = 4,
                       .heads_kv = 2,
                       .seqlen_q = 3,
                       .seqlen_k = keys};
    run_backwards(spec, keys == 130 ? Dtype::kFloat16 : Dtype::kBFloat16);
  }
}
TEST("few queries: the batch changes no bit of a sequence") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (slice_of(64) == 0) SKIP("this build has no kernels of this head dim");
  const Backend backend = cuda_backend();
  const Case spec = {
      .name = "batch", .batch = 3, .heads = 4, .heads_kv = 2, .seqlen_q = 2, .seqlen_k = 900};
  const Setup all = make_setup(spec, Dtype::kFloat16, 64, kFull), one = second_alone(all);
  for (const Schedule& schedule : schedules()) {
    begin(schedule);
    const RunResult many = Run(all, backend).forward(), single = Run(one, backend).forward();
    CHECK_EQ(many.error + single.error + finish(), std::string());
    CHECK_MESSAGE(many.forward_plan.starts_with("decode_"), many.forward_plan);
    const auto is_part = [](const std::vector<double>& part, const std::vector<double>& whole) {
      return std::equal(part.begin(), part.end(),
                        whole.begin() + static_cast<std::ptrdiff_t>(part.size()));
    };
    CHECK(is_part(single.values.out, many.values.out));
    CHECK(is_part(single.values.lse, many.values.lse));
  }
}
TEST("shapes fp16 d32") { run_cases(shape_cases(), Dtype::kFloat16, 32); }
TEST("shapes bf16 d96") { run_cases(shape_cases(), Dtype::kBFloat16, 96); }
TEST("shapes fp16 d192") { run_cases(shape_cases(), Dtype::kFloat16, 192); }
TEST("shapes bf16 d256") { run_cases(shape_cases(), Dtype::kBFloat16, 256); }
TEST("options bf16 d192") { run_cases(option_cases(), Dtype::kBFloat16, 192); }
TEST("options fp16 d256") { run_cases(option_cases(), Dtype::kFloat16, 256); }
