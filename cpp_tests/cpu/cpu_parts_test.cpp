// The parts of the CPU op on their own, compiled here for the baseline processor: exp2, the storage
// formats, the packing and the emulated tiles, each against plain loops.
#define FLASHTILE_CPU_ISA unit_test
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../support/check.h"
#include "../support/numbers.h"
#include "cpu/exp2.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/tiles_pack.h"

namespace op = flashtile::cpu::unit_test;
using flashtile::test::Dtype;

namespace {

template <class C, int kDegree>
C exp2_of(C x) {
  return op::exp2<C, kDegree>(op::splat(x))[0];
}

// Largest relative error over [-125.5, 1], as far as results are not 0.
template <class C, int kDegree>
double worst_exp2() {
  double worst = 0.0;
  for (double x = -125.4; x < 1.0; x += 0.00037) {
    const C rounded = static_cast<C>(x);
    const double truth = std::exp2(static_cast<double>(rounded));
    worst = std::fmax(worst, std::fabs(double(exp2_of<C, kDegree>(rounded)) - truth) / truth);
  }
  return worst;
}

template <class T>
double widened(uint16_t bits) {
  T numbers[op::kLanes<float>];
  for (T& n : numbers) n.bits = bits;
  return op::read(numbers)[op::kLanes<float> - 1];
}

template <class T>
uint16_t narrowed(float x) {
  T numbers[op::kLanes<float>];
  op::write(numbers, op::splat(x));
  return numbers[0].bits;
}

double half_value(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b; }

op::BFloat16 bfloat(float x) { return {narrowed<op::BFloat16>(x)}; }
float value(op::BFloat16 x) { return op::bit_cast<float>(uint32_t{x.bits} << 16); }

}  // namespace

TEST("exp2 is as exact as its polynomials say") {
  CHECK((worst_exp2<float, 5>() < 2.5e-7));
  CHECK((worst_exp2<float, 6>() < 1.3e-7));
  CHECK((worst_exp2<double, 11>() < 4.0e-16));
}

TEST("exp2 of -inf, of what would be denormal and of NaN") {
  CHECK_EQ((exp2_of<float, 6>(-INFINITY)), 0.0f);
  CHECK_EQ((exp2_of<float, 6>(-125.6f)), 0.0f);
  CHECK_EQ((exp2_of<float, 6>(-1e30f)), 0.0f);
  CHECK(std::isnan(exp2_of<float, 6>(NAN)));
  CHECK_EQ((exp2_of<double, 11>(-INFINITY)), 0.0);
  CHECK(std::isnan(exp2_of<double, 11>(NAN)));
}

TEST("every float16 and bfloat16 is read exactly") {
  const op::FlushDenormals guard(true);
  for (int bits = 0; bits < 65536; ++bits) {
    CHECK(same(widened<op::Half>(static_cast<uint16_t>(bits)), half_value(bits)));
    const bool denormal = (bits & 0x7f80) == 0;  // arithmetic counts these as zero
    const double exact = value(op::BFloat16{static_cast<uint16_t>(bits)});
    if (!denormal) CHECK(same(widened<op::BFloat16>(static_cast<uint16_t>(bits)), exact));
  }
}

TEST("float16 and bfloat16 are written to nearest even") {
  const op::FlushDenormals guard(true);
  for (int bits = 0; bits < 0x7c00; ++bits) {  // every positive float16, and what lies between two
    const double low = half_value(bits), high = bits == 0x7bff ? 65536.0 : half_value(bits + 1);
    for (const double part : {0.0, 0.25, 0.5, 0.75}) {
      const auto x = static_cast<float>(low + part * (high - low));
      if (x != 0 && std::fabs(x) < std::numeric_limits<float>::min()) continue;
      const double half = flashtile::test::round_to(Dtype::kFloat16, x);
      CHECK(same(half_value(narrowed<op::Half>(x)), half));
      CHECK(same(half_value(narrowed<op::Half>(-x)), -half));
      CHECK(same(value(bfloat(x)), flashtile::test::round_to(Dtype::kBFloat16, x)));
    }
  }
  CHECK_EQ(half_value(narrowed<op::Half>(1e30f)), INFINITY);
  CHECK(std::isnan(half_value(narrowed<op::Half>(NAN))));
  CHECK(std::isnan(value(bfloat(NAN))));
  CHECK_EQ(value(bfloat(-INFINITY)), -INFINITY);
}

TEST("packing transposes, pads with zeros and finds inf and NaN") {
  constexpr int64_t kRows = 21, kDim = 19, kStride = 23;
  std::vector<float> rows(kRows * kStride, NAN);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; d < kDim; ++d) rows[r * kStride + d] = static_cast<float>(100 * r + d);
  }
  constexpr int64_t kPanel = op::kPanel<float>;
  const op::Rows<const float> from{rows.data(), kStride};
  std::vector<float> columns(op::round_up(kRows, kPanel) * kDim, NAN);
  op::pack_transposed(from, kRows, kDim, 2.0f, columns.data());
  for (int64_t r = 0; r < op::round_up(kRows, kPanel); ++r) {
    for (int64_t d = 0; d < kDim; ++d) {
      const float expected = r < kRows ? 2.0f * static_cast<float>(100 * r + d) : 0.0f;
      CHECK_EQ(columns[r / kPanel * kPanel * kDim + d * kPanel + r % kPanel], expected);
    }
  }
  std::vector<float> packed(kRows * op::round_up(kDim, kPanel), NAN);
  CHECK(op::pack_rows(from, kRows, kDim, packed.data()));
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; d < op::round_up(kDim, kPanel); ++d) {
      const float expected = d < kDim ? static_cast<float>(100 * r + d) : 0.0f;
      CHECK_EQ(packed[d / kPanel * kPanel * kRows + r * kPanel + d % kPanel], expected);
    }
  }
  rows[20 * kStride + 18] = INFINITY;
  CHECK(!op::pack_rows(from, kRows, kDim, packed.data()));
}

TEST("the emulated tiles multiply like a matrix product") {
  constexpr int64_t kDepth = 64, kSide = 32;
  std::vector<op::BFloat16> a(kSide * kDepth), b(kDepth * kSide), packed(kDepth * kSide);
  std::vector<op::BFloat16> transposed(kSide * kDepth), columns(kDepth * kSide);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = bfloat(static_cast<float>(static_cast<int>(i * 37 % 17) - 8));
    b[i] = bfloat(static_cast<float>(static_cast<int>(i * 53 % 13) - 6));
  }
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t n = 0; n < kSide; ++n) transposed[n * kDepth + k] = b[k * kSide + n];
  }
  op::pack_right({b.data(), kSide}, kDepth, kSide, {packed.data(), kDepth});
  op::pack_right_transposed({transposed.data(), kDepth}, kSide, kDepth, {columns.data(), kDepth});
  CHECK(std::memcmp(packed.data(), columns.data(), packed.size() * 2) == 0);
  std::vector<float> c(kSide * kSide, 1.0f);
  op::Tiles tiles;
  op::multiply_tiles<true>(tiles, {a.data(), kDepth}, {packed.data(), kDepth}, kDepth, c.data(),
                           kSide);
  for (int64_t m = 0; m < kSide; ++m) {
    for (int64_t n = 0; n < kSide; ++n) {
      float expected = 1.0f;  // integers: exact in any order
      for (int64_t k = 0; k < kDepth; ++k) {
        expected += value(a[m * kDepth + k]) * value(b[k * kSide + n]);
      }
      CHECK_EQ(c[m * kSide + n], expected);
    }
  }
}
