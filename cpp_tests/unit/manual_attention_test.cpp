// Tests of the tests: number formats, manual attention against finite differences and known values,
// and that the error bound sees planted errors.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../support/check.h"
#include "../support/compare.h"

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
      : setup(make_setup(spec, Dtype::kBFloat16, 64, kCausal)), truth(setup), result(truth.exact) {}
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
      make_setup({.name = "", .seqlen_q = 3, .seqlen_k = 1}, Dtype::kFloat32, 8, kFull);
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
      make_setup({.name = "", .seqlen_q = 5, .seqlen_k = 2}, Dtype::kFloat64, 4, kCausal);
  const AttentionOutput output = manual_attention(manual_input(setup), Dtype::kFloat64);
  for (size_t row = 0; row < 3; ++row) {
    CHECK_EQ(output.lse[row], -kInfinity);
    for (size_t d = 0; d < 4; ++d) CHECK_EQ(output.out[row * 4 + d], 0.0);
    for (size_t d = 0; d < 4; ++d) CHECK_EQ(output.dq[row * 4 + d], 0.0);
  }
  for (size_t d = 0; d < 4; ++d)
    CHECK(std::fabs(output.out[3 * 4 + d] - setup.v.get(0, 0, 0, static_cast<int64_t>(d))) < 1e-15);
}

TEST("manual attention sees what the masks of this table say") {
  struct Row {
    Mask mask;
    std::vector<const char*> visible;  // one string a query, one character a key
  };
  const std::vector<Row> wide = {
      {kFull, {"xxxxx", "xxxxx", "xxxxx"}},
      {kCausal, {"xxx..", "xxxx.", "xxxxx"}},
      {kCausalTopLeft, {"x....", "xx...", "xxx.."}},
      {{0, 0}, {"..x..", "...x.", "....x"}},
      {{1, 0}, {".xx..", "..xx.", "...xx"}},
      {{0, 1}, {"..xx.", "...xx", "....x"}},
      {{1, -1}, {".xxxx", "..xxx", "...xx"}},
      {{-1, 1}, {"xxxx.", "xxxxx", "xxxxx"}},
      {{1, 1, true}, {"xx...", "xxx..", ".xxx."}},
      {{0, -1, true}, {"xxxxx", ".xxxx", "..xxx"}},
      {{INT64_MAX, INT64_MAX}, {"xxxxx", "xxxxx", "xxxxx"}},
      {{INT64_MAX, 0}, {"xxx..", "xxxx.", "xxxxx"}},
  };
  const std::vector<Row> tall = {
      {kCausal, {"..", "..", "x.", "xx"}},        {kCausalTopLeft, {"x.", "xx", "xx", "xx"}},
      {{0, 0}, {"..", "..", "x.", ".x"}},         {{0, 0, true}, {"x.", ".x", "..", ".."}},
      {{1, -1}, {"xx", "xx", "xx", "xx"}},        {{0, -1}, {"xx", "xx", "xx", ".x"}},
      {{1, -1, true}, {"xx", "xx", ".x", ".."}},  {{0, 2}, {"x.", "xx", "xx", ".x"}},
      {{-1, 1, true}, {"xx", "xx", "xx", "xx"}},  {{-1, 1}, {"..", "x.", "xx", "xx"}},
      {{0, 100, true}, {"xx", ".x", "..", ".."}},
  };
  // Scale 0 makes all scores equal and v is the unit matrix: out is visible / number of visible.
  const auto check = [](const std::vector<Row>& table, int rows, int keys) {
    const Case spec = {
        .name = "", .seqlen_q = rows, .seqlen_k = keys, .values = Values::kZeroScale};
    for (const Row& row : table) {
      AttentionInput input = manual_input(make_setup(spec, Dtype::kFloat64, {4, keys}, row.mask));
      for (int j = 0; j < keys; ++j) {
        for (int d = 0; d < keys; ++d)
          input.v[static_cast<size_t>(j) * static_cast<size_t>(keys) + static_cast<size_t>(d)] =
              j == d ? 1.0 : 0.0;
      }
      const AttentionOutput output = manual_attention(input, Dtype::kFloat64);
      for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
        const std::string visible = row.visible[i];
        const auto count = static_cast<double>(std::count(visible.begin(), visible.end(), 'x'));
        const std::string where = name_of(row.mask) + ", query " + std::to_string(i);
        for (size_t j = 0; j < static_cast<size_t>(keys); ++j) {
          const double expected = visible[j] == 'x' ? 1.0 / count : 0.0;
          CHECK_MESSAGE(output.out[i * static_cast<size_t>(keys) + j] == expected, where);
        }
        CHECK_MESSAGE(count == 0.0 ? output.lse[i] == -kInfinity
                                   : std::fabs(output.lse[i] - std::log(count)) < 1e-15,
                      where);
      }
    }
  };
  check(wide, 3, 5);
  check(tall, 4, 2);
}

TEST("names of masks") {
  CHECK_EQ(name_of(kFull), std::string("full"));
  CHECK_EQ(name_of(kCausalTopLeft), std::string("causal top-left"));
  CHECK_EQ(name_of(Mask{5, -1, true}), std::string("window 5,-1 top-left"));
  CHECK_EQ(std::string(kind_of({0, 0})), std::string("window"));
  CHECK_EQ(std::string(kind_of({0, -1})), std::string("window"));
  CHECK_EQ(std::string(kind_of({-1, 1})), std::string("window"));
}

TEST("manual gradients match finite differences") {
  for (const Mask& mask : {kFull, kCausal, kCausalTopLeft, Mask{2, 1}, Mask{1, -1, true}}) {
    const Case spec = {
        .name = "", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 5, .seqlen_k = 4};
    const AttentionInput input = manual_input(make_setup(spec, Dtype::kFloat64, {6, 3}, mask));
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

TEST("rows that take no part must be exactly 0") {
  const Case unused = {.name = "damaged",
                       .batch = 2,
                       .seqlen_q = 20,
                       .seqlen_k = 30,
                       .used_q = {20, 7},
                       .used_k = {30, 11}};
  const Case blind = {.name = "damaged", .seqlen_q = 20, .seqlen_k = 9};
  // An element of a query's row 8 of the last sequence, and of the last key's.
  const auto catches = [](const Case& spec, const Mask& mask, auto damage) {
    const Setup setup = make_setup(spec, Dtype::kFloat16, {16, 8}, mask);
    const Truth truth(setup);
    AttentionOutput result = truth.exact;
    CHECK(compare(setup, truth, result).passed());
    damage(result);
    CHECK(!compare(setup, truth, result).passed());
  };
  catches(unused, kFull, [](AttentionOutput& r) { r.out[28 * 8] = 1e-9; });
  catches(unused, kFull, [](AttentionOutput& r) { r.dq[28 * 16 + 3] = 1e-9; });
  catches(unused, kFull, [](AttentionOutput& r) { r.dk[59 * 16] = std::nan(""); });
  catches(unused, kFull, [](AttentionOutput& r) { r.dv[59 * 8] = -1e-9; });
  catches(unused, kFull, [](AttentionOutput& r) { r.lse[28] = 0.0; });
  catches(blind, kCausal, [](AttentionOutput& r) { r.out[8 * 8] = 1e-9; });  // sees no key
  catches(blind, kCausal, [](AttentionOutput& r) { r.dq[8 * 16] = 1e-9; });
  catches(blind, {0, 3}, [](AttentionOutput& r) { r.out[2 * 8] = 1e-9; });
  const Case unseen = {.name = "damaged", .seqlen_q = 9, .seqlen_k = 20};
  catches(unseen, kCausalTopLeft, [](AttentionOutput& r) { r.dk[9 * 16] = 1e-9; });
  catches(unseen, {2, 0}, [](AttentionOutput& r) { r.dv[8 * 8] = 1e-9; });
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
