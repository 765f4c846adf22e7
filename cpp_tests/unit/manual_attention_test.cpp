// Tests of the tests: number formats, manual attention against finite differences and known values,
// and that the error bound sees planted errors.
#include <cmath>
#include <vector>

#include "../check.h"
#include "../compare.h"

using namespace flashtile::test;

namespace {

double loss(const AttentionInput& input) {
  const AttentionOutput output = manual_attention(input, Dtype::kFloat64);
  double sum = 0.0;
  for (size_t i = 0; i < output.out.size(); ++i) sum += output.out[i] * input.dout[i];
  for (size_t i = 0; i < output.lse.size(); ++i) {
    if (std::isfinite(output.lse[i])) sum += output.lse[i] * input.dlse[i];
  }
  return sum;
}

void check_gradient(AttentionInput input, std::vector<double> AttentionInput::* tensor,
                    const std::vector<double>& gradient) {
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < gradient.size(); i += 3) {
    double& x = (input.*tensor)[i];
    const double before = x;
    x = before + kStep;
    const double above = loss(input);
    x = before - kStep;
    const double below = loss(input);
    x = before;
    CHECK(std::fabs((above - below) / (2 * kStep) - gradient[i]) < 1e-7);
  }
}

// A kernel result to damage: the truth itself.
struct Damaged {
  Setup setup;
  Truth truth;
  AttentionOutput result;

  explicit Damaged(const Case& spec)
      : setup(make_setup(spec, Dtype::kBFloat16, 64, true)), truth(setup), result(truth.exact) {}
  bool passes() const { return compare(setup, truth, result).passed(); }
};

const Case kCase = {.name = "damaged", .heads = 2, .heads_kv = 1, .seqlen_q = 200, .seqlen_k = 220};

}  // namespace

TEST("number formats") {
  CHECK_EQ(half_bits(1.0), 0x3c00);
  CHECK_EQ(half_bits(-65504.0), 0xfbff);
  CHECK_EQ(half_bits(0x1p-24), 0x0001);
  CHECK_EQ(round_to_half(65519.9), 65504.0);
  CHECK(std::isinf(round_to_half(65520.0)));
  CHECK_EQ(round_to_half(1.0 + 0x1p-11), 1.0);  // ties to even
  CHECK_EQ(round_to_half(1.0 + 3 * 0x1p-11), 1.0 + 0x1p-9);
  CHECK_EQ(round_to_bfloat(1.0 + 0x1p-8), 1.0);
  CHECK_EQ(round_to_bfloat(1.0 + 0x1.8p-8), 1.0 + 0x1p-7);
  CHECK(std::isinf(round_to_bfloat(0x1.ffp127)));
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto value = half_value(static_cast<uint16_t>(bits));
    if (std::isfinite(value)) CHECK_EQ(half_bits(value), static_cast<uint16_t>(bits));
  }
  for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
    const uint64_t poison = ~uint64_t{0};
    CHECK(std::isnan(load(dtype, &poison)));
    uint64_t memory = 0;
    store(dtype, &memory, -2.5);
    CHECK_EQ(load(dtype, &memory), -2.5);
  }
}

TEST("manual attention of one key is its value") {
  const Setup setup =
      make_setup({.name = "", .seqlen_q = 3, .seqlen_k = 1}, Dtype::kFloat32, 8, false);
  const AttentionInput input = manual_input(setup);
  const AttentionOutput output = manual_attention(input, Dtype::kFloat64);
  for (size_t i = 0; i < output.out.size(); ++i)
    CHECK(std::fabs(output.out[i] - input.v[i % 8]) < 1e-15);
  double score = 0.0;
  for (size_t d = 0; d < 8; ++d) score += input.q[d] * input.k[d];
  CHECK(std::fabs(output.lse[0] - score * setup.softmax_scale) < 1e-12);
}

TEST("manual attention aligns causal at the bottom right") {
  const Setup setup =
      make_setup({.name = "", .seqlen_q = 5, .seqlen_k = 2}, Dtype::kFloat64, 4, true);
  const AttentionOutput output = manual_attention(manual_input(setup), Dtype::kFloat64);
  for (size_t row = 0; row < 3; ++row) {
    CHECK_EQ(output.lse[row], -kInfinity);
    for (size_t d = 0; d < 4; ++d) CHECK_EQ(output.out[row * 4 + d], 0.0);
    for (size_t d = 0; d < 4; ++d) CHECK_EQ(output.dq[row * 4 + d], 0.0);
  }
  for (size_t d = 0; d < 4; ++d)
    CHECK(std::fabs(output.out[3 * 4 + d] - setup.v.get(0, 0, 0, static_cast<int64_t>(d))) < 1e-15);
}

TEST("manual gradients match finite differences") {
  for (const bool causal : {false, true}) {
    const Case spec = {
        .name = "", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 5, .seqlen_k = 4};
    const AttentionInput input = manual_input(make_setup(spec, Dtype::kFloat64, 6, causal));
    const AttentionOutput output = manual_attention(input, Dtype::kFloat64);
    check_gradient(input, &AttentionInput::q, output.dq);
    check_gradient(input, &AttentionInput::k, output.dk);
    check_gradient(input, &AttentionInput::v, output.dv);
  }
}

TEST("the bound passes the truth and the plain dtype") {
  Damaged damaged(kCase);
  CHECK(damaged.passes());
  damaged.result = damaged.truth.rounded;
  damaged.result.lse = damaged.truth.exact.lse;
  CHECK(damaged.passes());
}

TEST("the bound catches planted errors") {
  const auto catches = [](auto damage) {
    Damaged damaged(kCase);
    damage(damaged);
    CHECK(!damaged.passes());
  };
  catches([](Damaged& d) { d.result.out[5] = std::nan(""); });
  catches([](Damaged& d) { d.result.out[5] = kInfinity; });
  catches([](Damaged& d) { d.result.out[20000] += 0.05; });
  catches([](Damaged& d) { d.result.lse[7] += 1e-4; });
  catches([](Damaged& d) { d.result.lse[7] = -kInfinity; });
  catches([](Damaged& d) { d.result.dq[300] += 0.1; });
  catches([](Damaged& d) { d.result.dk[d.result.dk.size() - 1] += 0.1; });
  catches([](Damaged& d) { d.result.dv[0] += 0.3; });
  // One more visible key in the last row: an error of a hundredth of a value.
  catches([](Damaged& d) {
    for (size_t i = d.result.out.size() - 64; i < d.result.out.size(); ++i) d.result.out[i] *= 1.1;
  });
}

TEST("writes between rows are seen") {
  HostTensor tensor(Dtype::kFloat16, {2, 5, 3, 8}, Layout::kPadded);
  Normal normal(1);
  fill(tensor, normal, 1.0);
  CHECK(tensor.gaps_are_untouched());
  tensor.bytes()[tensor.start_byte() + 8 * 2] = 0;  // first byte after the first head's 8 elements
  CHECK(!tensor.gaps_are_untouched());
}
