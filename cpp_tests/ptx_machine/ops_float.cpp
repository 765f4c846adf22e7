// fp32 and fp64 arithmetic. approx functions are computed by the host's libm in float;
// full-precision ones are IEEE. .ftz flushes subnormal inputs and results through the host's
// rounding modes.
#include "ops.h"

namespace ptx {

namespace {

// The host flushes what it computes; what is only compared or moved is flushed here.
template <bool kFtz>
float flushed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return !kFtz || (bits & 0x7F800000) != 0 ? x : std::bit_cast<float>(bits & 0x80000000);
}

// PTX min and max: the number when the other is NaN, and -0 < +0.
template <class T>
T minimum(T a, T b) {
  if (a == b) return std::signbit(a) ? a : b;
  return (a < b || b != b) ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return (a > b || b != b) ? a : b;
}
template <class T>
T minimum_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : minimum(a, b);
}
template <class T>
T maximum_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : maximum(a, b);
}

float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// 2^x in double, rounded once: within 0.51 ulp of the exact result, as good as libm's exp2f, and
// vectorisable.
float exp2_lane(float x) {
  const float limited = x < -160.0f ? -160.0f : (x > 130.0f ? 130.0f : x);  // NaN: 130, fixed below
  const double shifted = static_cast<double>(limited) + 6755399441055744.0;  // 1.5 * 2^52: round
  const double n = shifted - 6755399441055744.0;
  const double f = (static_cast<double>(limited) - n) * 0.6931471805599453;
  double p = 1.0 / 3628800;
  for (const double c : {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24,
                         1.0 / 6, 0.5, 1.0, 1.0}) {
    p = p * f + c;
  }
  const int64_t exponent = std::bit_cast<int64_t>(shifted) << 52;
  const double result = std::bit_cast<double>(std::bit_cast<int64_t>(p) + exponent);
  return x != x ? x : static_cast<float>(result);
}

template <bool kFtz>
void ex2(Warp& warp, const Inst& inst, uint32_t mask) {
  warp.block->counters->ex2 += std::popcount(mask);
  map_float<kFtz, exp2_lane, float, float>(warp, inst, mask);
}

template <bool kFtz>
void add_f32(OpTable& t, const std::string& ftz) {
  using F = float;
  const auto rounded = [&](const std::string& op, auto add) {
    add(op + ftz + ".f32");
    add(op + ".rn" + ftz + ".f32");
  };
  rounded("add", [&](const std::string& n) {
    add_map_float<kFtz, [](F a, F b) { return a + b; }, F, F, F>(t, n);
  });
  rounded("sub", [&](const std::string& n) {
    add_map_float<kFtz, [](F a, F b) { return a - b; }, F, F, F>(t, n);
  });
  rounded("mul", [&](const std::string& n) {
    add_map_float<kFtz, [](F a, F b) { return a * b; }, F, F, F>(t, n);
  });
  add_map_float<kFtz, [](F a, F b, F c) { return __builtin_fmaf(a, b, c); }, F, F, F, F>(
      t, "fma.rn" + ftz + ".f32");
  add_map_float<kFtz, [](F a, F b, F c) { return __builtin_fmaf(a, b, c); }, F, F, F, F>(
      t, "mad" + ftz + ".f32");
  add_map_float<kFtz, [](F a, F b, F c) { return saturate(__builtin_fmaf(a, b, c)); }, F, F, F, F>(
      t, "fma.rn" + ftz + ".sat.f32");
  add_map_float<kFtz, [](F a, F b) { return saturate(a + b); }, F, F, F>(t,
                                                                         "add" + ftz + ".sat.f32");
  add_map_float<kFtz, [](F a, F b) { return saturate(a * b); }, F, F, F>(t,
                                                                         "mul" + ftz + ".sat.f32");
  add_map_float<kFtz, [](F a, F b) { return minimum(flushed<kFtz>(a), flushed<kFtz>(b)); }, F, F,
                F>(t, "min" + ftz + ".f32");
  add_map_float<kFtz, [](F a, F b) { return maximum(flushed<kFtz>(a), flushed<kFtz>(b)); }, F, F,
                F>(t, "max" + ftz + ".f32");
  add_map_float<kFtz, [](F a, F b) { return minimum_nan(flushed<kFtz>(a), flushed<kFtz>(b)); }, F,
                F, F>(t, "min" + ftz + ".NaN.f32");
  add_map_float<kFtz, [](F a, F b) { return maximum_nan(flushed<kFtz>(a), flushed<kFtz>(b)); }, F,
                F, F>(t, "max" + ftz + ".NaN.f32");
  add_map_float<kFtz, [](F a) { return -flushed<kFtz>(a); }, F, F>(t, "neg" + ftz + ".f32");
  add_map_float<kFtz, [](F a) { return std::fabs(flushed<kFtz>(a)); }, F, F>(t,
                                                                             "abs" + ftz + ".f32");
  for (const char* op : {"div.approx", "div.full", "div.rn"}) {
    add_map_float<kFtz, [](F a, F b) { return a / b; }, F, F, F>(t, op + ftz + ".f32");
  }
  for (const char* op : {"rcp.approx", "rcp.rn"}) {
    add_map_float<kFtz, [](F a) { return 1.0f / a; }, F, F>(t, op + ftz + ".f32");
  }
  for (const char* op : {"sqrt.approx", "sqrt.rn"}) {
    add_map_float<kFtz, [](F a) { return std::sqrt(a); }, F, F>(t, op + ftz + ".f32");
  }
  add_map_float<kFtz, [](F a) { return static_cast<F>(1.0 / std::sqrt(static_cast<double>(a))); },
                F, F>(t, "rsqrt.approx" + ftz + ".f32");
  add_map_float<kFtz, [](F a) { return std::log2(a); }, F, F>(t, "lg2.approx" + ftz + ".f32");
  add_map_float<kFtz, [](F a) { return std::sin(a); }, F, F>(t, "sin.approx" + ftz + ".f32");
  add_map_float<kFtz, [](F a) { return std::cos(a); }, F, F>(t, "cos.approx" + ftz + ".f32");
  t.add("ex2.approx" + ftz + ".f32", "r=r", ex2<kFtz>);
}

void add_f64(OpTable& t) {
  using F = double;
  for (const char* rn : {"", ".rn"}) {
    const std::string suffix = std::string(rn) + ".f64";
    add_map_float<false, [](F a, F b) { return a + b; }, F, F, F>(t, "add" + suffix);
    add_map_float<false, [](F a, F b) { return a - b; }, F, F, F>(t, "sub" + suffix);
    add_map_float<false, [](F a, F b) { return a * b; }, F, F, F>(t, "mul" + suffix);
  }
  add_map_float<false, [](F a, F b, F c) { return __builtin_fma(a, b, c); }, F, F, F, F>(
      t, "fma.rn.f64");
  add_map_float<false, [](F a, F b) { return a / b; }, F, F, F>(t, "div.rn.f64");
  add_map_float<false, [](F a) { return 1.0 / a; }, F, F>(t, "rcp.rn.f64");
  add_map_float<false, [](F a) { return std::sqrt(a); }, F, F>(t, "sqrt.rn.f64");
  add_map_float<false, minimum<F>, F, F, F>(t, "min.f64");
  add_map_float<false, maximum<F>, F, F, F>(t, "max.f64");
  add_map_float<false, [](F a) { return -a; }, F, F>(t, "neg.f64");
  add_map_float<false, [](F a) { return std::fabs(a); }, F, F>(t, "abs.f64");
}

}  // namespace

void add_float_ops(OpTable& t) {
  add_f32<false>(t, "");
  add_f32<true>(t, ".ftz");
  add_map_float<false, [](float a) { return std::tanh(a); }, float, float>(t, "tanh.approx.f32");
  add_map_float<false, [](float a, float b) { return std::copysign(b, a); }, float, float, float>(
      t, "copysign.f32");
  add_f64(t);
}

}  // namespace ptx
