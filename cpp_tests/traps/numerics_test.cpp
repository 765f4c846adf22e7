// Values that broke other libraries (N) and tests that could not see it (X). Names begin with the
// trap's id; what a comment leaves out of a trap's original size is said there.
#include <algorithm>
#include <cmath>

#include "target.h"

using namespace flashtile::test;

namespace {

double one(auto...) { return 1.0; }

// All logits near `logit`: q[0] = 1, k[0] = logit / scale, the other columns normal.
Setup near_logit(const Case& spec, Dtype dtype, int head_dim, const Mask& mask, double logit) {
  Setup setup = make_setup(spec, dtype, head_dim, mask);
  const double key = logit / setup.softmax_scale;
  set_all(setup.q,
          [&](auto b, auto s, auto h, auto d) { return d == 0 ? 1.0 : setup.q.get(b, s, h, d); });
  set_all(setup.k,
          [&](auto b, auto s, auto h, auto d) { return d == 0 ? key : setup.k.get(b, s, h, d); });
  return setup;
}

}  // namespace

TEST("N1 one query, one key, head dim 16, values x 3, dout = 1") {
  for (const Dtype dtype : trap_dtypes()) {
    Setup setup = make_setup(
        {.name = "N1", .seqlen_q = 1, .seqlen_k = 1, .values = Values::kTriple}, dtype, 16, kFull);
    set_all(setup.dout, one<int64_t, int64_t, int64_t, int64_t>);
    check_setup(setup);
  }
}

TEST("N2 1024 queries and keys, head dim 128, fp16 x 3, causal") {
  check_case({.name = "N2",
              .seqlen_q = 1024,
              .seqlen_k = 1024,
              .masks = {kCausal},
              .values = Values::kTriple},
             128, {Dtype::kFloat16});
}

TEST("N3 varlen 76, 34, 146 queries over one key each, head dim 32, fp16 x 3, causal, dout = 1") {
  Setup setup = make_setup(
      {.name = "N3", .lengths_q = {76, 34, 146}, .lengths_k = {1, 1, 1}, .values = Values::kTriple},
      Dtype::kFloat16, 32, kCausal);
  set_all(setup.dout, one<int64_t, int64_t, int64_t, int64_t>);
  check_setup(setup);
}

TEST("N4 q = k = v = 133120") {
  Setup setup =
      make_setup({.name = "N4", .seqlen_q = 1, .seqlen_k = 1}, Dtype::kBFloat16, 64, kFull);
  for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v})
    set_all(*tensor, [](auto...) { return 133120.0; });
  for (const RunResult& result : results_of(setup)) {
    const AttentionOutput& values = result.values;
    for (const double x : values.out) CHECK_EQ(x, 133120.0);
    CHECK_EQ(values.dv.size(), size_t{64});
    const std::vector<double> dout = setup.dout.dense();
    for (size_t i = 0; i < values.dv.size(); ++i) CHECK_EQ(values.dv[i], dout[i]);  // P is 1
    for (const auto* tensor : {&values.lse, &values.dq, &values.dk, &values.dv})
      CHECK(all_finite(*tensor));
  }
}

TEST("N4 logits of 1e11 of both signs, several keys and blocks") {
  for (const int sign : {1, -1}) {
    Setup setup =
        make_setup({.name = "N4", .seqlen_q = 70, .seqlen_k = 200}, Dtype::kBFloat16, 64, kCausal);
    set_all(setup.q, [](auto...) { return 133120.0; });
    set_all(setup.k, [&](auto, auto s, auto, auto) { return sign * 133120.0 * (1 + s % 3); });
    for (const RunResult& result : results_of(setup)) {
      for (const auto* tensor : {&result.values.out, &result.values.lse, &result.values.dq,
                                 &result.values.dk, &result.values.dv})
        CHECK(all_finite(*tensor));
      const AttentionOutput exact = manual_attention(manual_input(setup), Dtype::kFloat64);
      double worst = 0.0;  // equal keys share the weight
      for (size_t i = 0; i < exact.out.size(); ++i)
        worst = std::max(worst, std::fabs(result.values.out[i] - exact.out[i]));
      CHECK_MESSAGE(worst < 0.02, std::to_string(worst));
    }
  }
}

TEST("N5 every logit near -120, 64 to 1280 keys") {
  for (const int keys : {64, 192, 704, 1216, 640, 1280, 1000}) {
    const int head_dim = keys % 128 == 64 ? 64 : keys == 1000 ? 128 : 32;
    check_case({.name = "N5", .seqlen_q = 40, .seqlen_k = keys, .values = Values::kVeryNegative},
               head_dim, half_dtypes());
  }
}

TEST("N6 one query, 128 and 97 keys, every logit near -122: dk and dv finite") {
  for (const int keys : {128, 97}) {
    for (const Dtype dtype : half_dtypes())
      check_setup(
          near_logit({.name = "N6", .seqlen_q = 1, .seqlen_k = keys}, dtype, 64, kFull, -122));
  }
}

TEST("N7 logits from 0 down to -2.45e5") {
  for (const Dtype dtype : half_dtypes()) {
    Setup setup = make_setup({.name = "N7", .seqlen_q = 70, .seqlen_k = 200}, dtype, 64, kFull);
    set_all(setup.q, [&](auto b, auto s, auto h, auto d) {
      return d == 0 ? 128.0 : setup.q.get(b, s, h, d);
    });
    set_all(setup.k, [&](auto b, auto s, auto h, auto d) {
      return d == 0 ? -15312.0 * static_cast<double>(s % 5) / 4 : setup.k.get(b, s, h, d);
    });
    check_setup(setup);
  }
}

TEST("N7 whole rows at -2e5") {
  // One number tells all keys apart, so that their scores are sums without rounding: -2e5, -2e5
  // - 2.
  Setup setup =
      make_setup({.name = "N7", .seqlen_q = 70, .seqlen_k = 200}, Dtype::kBFloat16, 64, kFull);
  set_all(setup.q, [](auto, auto, auto, auto d) { return d == 0 ? 128.0 : d == 1 ? 16.0 : 0.0; });
  set_all(setup.k, [](auto, auto s, auto, auto d) {
    return d == 0 ? -12480.0 : d == 1 ? -1.0 * static_cast<double>(s % 2) : 0.0;
  });
  check_setup(setup);
}

TEST("N8 every logit negative, and rows that see no key") {
  check_case({.name = "N8", .seqlen_q = 150, .seqlen_k = 77, .values = Values::kVeryNegative}, 64,
             half_dtypes());
}

TEST("N9 88 queries, 448 keys, heads 14/2, causal, strongly negative, first block hidden") {
  for (const Mask& mask : {kCausal, Mask{200, 0}}) {
    check_setup(
        near_logit({.name = "N9", .heads = 14, .heads_kv = 2, .seqlen_q = 88, .seqlen_k = 448},
                   Dtype::kBFloat16, 64, mask, -90));
  }
}

TEST("N11 softmax_scale negative, and 0") {
  for (const Values values : {Values::kNegativeScale, Values::kZeroScale}) {
    check_case({.name = "N11",
                .heads = 2,
                .heads_kv = 2,
                .seqlen_q = 70,
                .seqlen_k = 150,
                .masks = {kFull, kCausal, {20, 10}},
                .values = values},
               64);
  }
}

TEST("N12 normal values x 5, bf16, with masks") {
  for (const Mask& mask : {kFull, kCausal, kCausalTopLeft, Mask{40, 20}}) {
    Setup setup =
        make_setup({.name = "N12", .seqlen_q = 130, .seqlen_k = 200}, Dtype::kBFloat16, 64, mask);
    for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v}) scale_all(*tensor, 5.0);
    check_setup(setup);
  }
}

// Decided: rows that do not see the key do not see its NaN.
TEST("N13 NaN in a key reaches exactly the rows that see it") {
  for (const Mask& mask : {kCausal, Mask{30, 0}, Mask{-1, 20, true}}) {
    Setup setup =
        make_setup({.name = "N13", .seqlen_q = 200, .seqlen_k = 200}, Dtype::kFloat16, 64, mask);
    setup.spec.values = Values::kNan;  // forward only
    for (int64_t d = 0; d < 64; ++d) setup.k.set(0, 100, 0, d, std::nan(""));
    check_setup(setup);
  }
}

// Decided: as 0 * NaN does in plain attention, it may reach the other rows of a block; no further.
TEST("N13 NaN in a value reaches the rows that see it, and none of another block") {
  constexpr int kRows = 700, kKey = 350, kBlock = 128;
  for (const Mask& mask : {kCausal, Mask{30, 0}, Mask{-1, 20, true}}) {
    Setup setup = make_setup({.name = "N13", .seqlen_q = kRows, .seqlen_k = kRows}, Dtype::kFloat16,
                             64, mask);
    setup.spec.values = Values::kNan;  // forward only
    const AttentionOutput clean = manual_attention(manual_input(setup), Dtype::kFloat64);
    for (int64_t d = 0; d < 64; ++d) setup.v.set(0, kKey, 0, d, std::nan(""));
    for (const RunResult& result : results_of(setup)) {
      for (int row = 0; row < kRows; ++row) {
        const double out = result.values.out[static_cast<size_t>(row) * 64];
        bool near = false;  // a row of the same block may see a key of the same block
        for (int i = row - kBlock; i <= row + kBlock; ++i) {
          for (int j = kKey - kBlock; j <= kKey + kBlock; ++j)
            near = near || sees(mask, kRows, kRows, i, j);
        }
        const std::string where = name_of(mask) + ", row " + std::to_string(row);
        if (sees(mask, kRows, kRows, row, kKey)) {
          CHECK_MESSAGE(std::isnan(out), where);
        } else if (!near) {
          CHECK_MESSAGE(std::fabs(out - clean.out[static_cast<size_t>(row) * 64]) < 1e-2, where);
        }
      }
    }
  }
}

TEST("X1 257 queries, one key: the reference has no error") {
  check_case({.name = "X1", .seqlen_q = 257, .seqlen_k = 1}, 64);
}

TEST("X2 NaN where the truth is finite is no pass, nor is a finite number where it is NaN") {
  const Setup setup =
      make_setup({.name = "X2", .seqlen_q = 20, .seqlen_k = 30}, Dtype::kFloat16, 8, kFull);
  const Truth truth(setup);
  AttentionOutput result = truth.exact;
  CHECK(compare(setup, truth, result).passed());
  result.out[3] = std::nan("");
  CHECK(!compare(setup, truth, result).passed());
  Truth broken = truth;
  broken.exact.out[3] = std::nan("");
  CHECK(!compare(setup, broken, truth.exact).passed());
  CHECK(!compare(setup, broken, broken.rounded).passed());
}

TEST("X4 the kernel that ran is the one that was meant") {
  for (const RunResult& result : results_of(make_setup(
           {.name = "X4", .seqlen_q = 70, .seqlen_k = 70}, Dtype::kFloat16, 80, kCausal))) {
    CHECK_MESSAGE(result.forward_plan.starts_with("forward_"), result.forward_plan);
    CHECK_MESSAGE(result.backward_plan.starts_with("backward_"), result.backward_plan);
    CHECK_MESSAGE(result.forward_plan.find("fp16") != std::string::npos, result.forward_plan);
  }
}

TEST("X7 640 queries, 128 keys, head dim 128, MHA and MQA: dq") {
  for (const int heads_kv : {2, 1}) {
    check_case({.name = "X7",
                .heads = 2,
                .heads_kv = heads_kv,
                .seqlen_q = 640,
                .seqlen_k = 128,
                .masks = {kFull}},
               128, {Dtype::kBFloat16});
  }
}
