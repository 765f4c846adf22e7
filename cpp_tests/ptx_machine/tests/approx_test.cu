// Approximate functions, halves, and everything that rounds: against doubles and exhaustive search.
#include <cmath>
#include <cstring>
#include <random>

#include "run.h"

namespace {

using ptx_test::Array;

__global__ void approximations(const float* x, float* ex2, float* lg2, float* rcp, float* rsqrt,
                               float* sine) {
  const int i = static_cast<int>(threadIdx.x);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(ex2[i]) : "f"(x[i]));
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(lg2[i]) : "f"(fabsf(x[i])));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(rcp[i]) : "f"(x[i]));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(rsqrt[i]) : "f"(fabsf(x[i])));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine[i]) : "f"(x[i]));
}

double value(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = (bits >> 10) & 31;
  const double mantissa = bits & 1023;
  const double sign = (bits & 0x8000) ? -1 : 1;
  if (exponent == 31) return mantissa != 0 ? std::nan("") : sign * INFINITY;
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// The nearest representable value, ties to the even pattern, found by trying all of them. Patterns
// of one sign ascend with the value; infinity counts as the next step of the largest exponent.
uint16_t nearest(long double x, bool bf16) {
  if (std::isnan(x)) return 0x7FFF;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const long double magnitude = std::fabs(x);
  const uint16_t infinity = bf16 ? 0x7F80 : 0x7C00;
  const long double beyond = bf16 ? std::ldexp(1.0L, 128) : 65536.0L;
  uint16_t low = 0;
  uint16_t high = infinity;
  const auto at = [&](uint16_t p) {
    return p == infinity ? beyond : static_cast<long double>(value(p, bf16));
  };
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (at(middle) <= magnitude ? low : high) = middle;
  }
  if (magnitude >= beyond) return static_cast<uint16_t>(sign | infinity);
  const long double below = magnitude - at(low);
  const long double above = at(high) - magnitude;
  const bool up = above < below || (above == below && (low & 1));
  return static_cast<uint16_t>(sign | (up ? high : low));
}

bool same_half(uint16_t a, uint16_t b, bool bf16) {
  return a == b || (std::isnan(value(a, bf16)) && std::isnan(value(b, bf16)));
}

__global__ void narrow(const float* x, uint16_t* f16, uint16_t* bf16, uint32_t* f16x2,
                       uint32_t* bf16x2) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(f16[i]) : "f"(x[i]));
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bf16[i]) : "f"(x[i]));
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(f16x2[i]) : "f"(x[i]), "f"(x[i ^ 1]));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bf16x2[i]) : "f"(x[i]), "f"(x[i ^ 1]));
}

__global__ void widen(float* f16, float* bf16) {
  const uint16_t bits = static_cast<uint16_t>(blockIdx.x * blockDim.x + threadIdx.x);
  asm("cvt.f32.f16 %0, %1;" : "=f"(f16[bits]) : "h"(bits));
  asm("{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 %0, {zero, %1}; }"
      : "=f"(bf16[bits])
      : "h"(bits));
}

template <bool kBf16>
__global__ void packed(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* fma,
                       uint32_t* smallest) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if constexpr (kBf16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(fma[i]) : "r"(a[i]), "r"(b[i]), "r"(c[i]));
    asm("min.bf16x2 %0, %1, %2;" : "=r"(smallest[i]) : "r"(a[i]), "r"(b[i]));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(fma[i]) : "r"(a[i]), "r"(b[i]), "r"(c[i]));
    asm("min.f16x2 %0, %1, %2;" : "=r"(smallest[i]) : "r"(a[i]), "r"(b[i]));
  }
}

double relative(double got, double exact) {
  if (got == exact || (std::isnan(got) && std::isnan(exact))) return 0;
  return std::fabs(got - exact) / std::fabs(exact);
}

std::vector<float> floats(size_t count) {
  std::mt19937_64 random(5);
  std::vector<float> x(count);
  for (float& v : x) {
    const uint32_t bits = static_cast<uint32_t>(random());
    std::memcpy(&v, &bits, 4);
  }
  const float edges[] = {0.0f,        -0.0f,         1e-40f,         65504.0f,
                         65519.9f,    65520.0f,      5.9604645e-8f,  2.9802322e-8f,
                         2.98e-8f,    1.0009765625f, 1.00048828125f, 1.00390625f,
                         1.01171875f, 3.4e38f,       INFINITY,       -INFINITY,
                         NAN};
  std::copy(std::begin(edges), std::end(edges), x.begin());
  for (size_t i = count / 2; i < count; ++i)
    x[i] = std::ldexp(1.0f + static_cast<float>(random() % 4096) / 4096,
                      static_cast<int>(random() % 60) - 30);
  return x;
}

template <bool kBf16>
void check_packed() {
  constexpr int kCount = 2048;
  std::mt19937 random(9);
  std::vector<uint32_t> input[3];
  for (auto& v : input) {
    for (int i = 0; i < kCount; ++i)
      v.push_back(i % 2 ? random() : (random() & 0x0FFF0FFF) | 0x30003000);
  }
  ptx_test::fresh_machine();
  const Array<uint32_t> a(input[0]), b(input[1]), c(input[2]), fma(kCount), smallest(kCount);
  packed<kBf16><<<kCount / 128, 128>>>(a.get(), b.get(), c.get(), fma.get(), smallest.get());
  ptx_test::check_clean();
  int wrong = 0;
  for (int i = 0; i < 2 * kCount; ++i) {
    const auto half = [&](const std::vector<uint32_t>& v) {
      return static_cast<uint16_t>(v[i / 2] >> (16 * (i % 2)));
    };
    const double x = value(half(input[0]), kBf16), y = value(half(input[1]), kBf16),
                 z = value(half(input[2]), kBf16);
    // What long double cannot hold of the sum only matters on the side of a tie.
    const long double product = static_cast<long double>(x) * y;
    const long double sum = product + z;
    const long double rest =
        std::fabs(product) > std::fabs(z) ? z - (sum - product) : product - (sum - z);
    const long double nudged = std::isfinite(sum) && rest != 0
                                   ? std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY)
                                   : sum;
    const bool on_a_tie = nearest(sum, kBf16) != nearest(nudged, kBf16);
    wrong += !same_half(half(fma.host()), nearest(on_a_tie ? nudged : sum, kBf16), kBf16);
    const double lower = std::isnan(x)                          ? y
                         : std::isnan(y)                        ? x
                         : x < y || (x == y && std::signbit(x)) ? x
                                                                : y;
    wrong += relative(value(half(smallest.host()), kBf16), lower) != 0;
  }
  CHECK_EQ(wrong, 0);
}

}  // namespace

TEST("ex2, lg2, rcp, rsqrt and sin stay within the accuracy of the hardware") {
  std::vector<float> x;
  for (int i = 0; i < 256; ++i) x.push_back(static_cast<float>(i - 128) * 0.99f + 0.013f);
  x[0] = -INFINITY, x[1] = INFINITY, x[2] = NAN, x[3] = 0.0f, x[4] = -126.5f, x[5] = -200.0f,
  x[6] = 127.9f;
  ptx_test::fresh_machine();
  const Array<float> in(x), ex2(256), lg2(256), rcp(256), rsqrt(256), sine(256);
  approximations<<<1, 256>>>(in.get(), ex2.get(), lg2.get(), rcp.get(), rsqrt.get(), sine.get());
  ptx_test::check_clean();
  for (int i = 0; i < 256; ++i) {
    const double v = x[i];
    const double power = std::exp2(v);
    CHECK(relative(ex2[i], power < 1.1754943508222875e-38 ? 0.0 : power) < 1.3e-7 ||
          (power > 3.4e38 && std::isinf(ex2[i])));
    CHECK(relative(lg2[i], std::log2(std::fabs(v))) < 2e-7);
    CHECK(relative(rcp[i], 1.0 / v) < 1.3e-7);
    CHECK(relative(rsqrt[i], 1.0 / std::sqrt(std::fabs(v))) < 1.3e-7);
    if (std::isfinite(v)) CHECK(std::fabs(sine[i] - std::sin(v)) < 1e-6);
  }
}

TEST("fp32 to fp16 and bf16 rounds to nearest even") {
  constexpr int kCount = 4096;
  const std::vector<float> x = floats(kCount);
  ptx_test::fresh_machine();
  const Array<float> in(x);
  const Array<uint16_t> f16(kCount), bf16(kCount);
  const Array<uint32_t> f16x2(kCount), bf16x2(kCount);
  narrow<<<kCount / 128, 128>>>(in.get(), f16.get(), bf16.get(), f16x2.get(), bf16x2.get());
  ptx_test::check_clean();
  int wrong = 0;
  for (int i = 0; i < kCount; ++i) {
    wrong += !same_half(f16[i], nearest(x[i], false), false);
    wrong += !same_half(bf16[i], nearest(x[i], true), true);
    wrong += !same_half(static_cast<uint16_t>(f16x2[i] >> 16), nearest(x[i], false), false);
    wrong += !same_half(static_cast<uint16_t>(f16x2[i]), nearest(x[i ^ 1], false), false);
    wrong += !same_half(static_cast<uint16_t>(bf16x2[i] >> 16), nearest(x[i], true), true);
    wrong += !same_half(static_cast<uint16_t>(bf16x2[i]), nearest(x[i ^ 1], true), true);
  }
  CHECK_EQ(wrong, 0);
}

TEST("every fp16 and bf16 pattern widens exactly") {
  ptx_test::fresh_machine();
  const Array<float> f16(65536), bf16(65536);
  widen<<<512, 128>>>(f16.get(), bf16.get());
  ptx_test::check_clean();
  const auto f = f16.host();
  const auto b = bf16.host();
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    wrong += relative(f[i], value(static_cast<uint16_t>(i), false)) != 0;
    wrong += relative(b[i], value(static_cast<uint16_t>(i), true)) != 0;
  }
  CHECK_EQ(wrong, 0);
}

TEST("packed fp16 arithmetic") { check_packed<false>(); }
TEST("packed bf16 arithmetic") { check_packed<true>(); }
