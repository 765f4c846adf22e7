// fp16 and bf16 arithmetic, single and packed, rounded once: sums in fp64 and the error of that sum
// decide, so that no intermediate rounding shows.
#include "half.h"
#include "ops.h"

namespace ptx {

namespace {

// x with its last bit set if `error` says that the exact value lies off x: rounding to odd. A later
// rounding to a format with at least two bits less is then the rounding of the exact value.
double to_odd(double x, double error) {
  uint64_t bits = std::bit_cast<uint64_t>(x);
  if (error == 0.0 || (bits & 1) != 0 || !std::isfinite(x)) return x;
  const bool outwards = std::signbit(error) == std::signbit(x);
  bits += outwards ? 1 : ~uint64_t{0};
  return std::bit_cast<double>(bits);
}

// a + b rounded to odd; the error term is exact (Knuth's two-sum).
double sum_to_odd(double a, double b) {
  const double sum = a + b;
  const double from_b = sum - a;
  return to_odd(sum, (a - (sum - from_b)) + (b - from_b));
}

// The double (exact, or rounded to odd) rounded to H. On the way to float it is rounded to odd too.
template <class H>
uint16_t narrow_double(double x) {
  float f = static_cast<float>(x);
  if (static_cast<double>(f) != x && std::isfinite(f)) {
    uint32_t bits = std::bit_cast<uint32_t>(f);
    if ((bits & 1) == 0) {  // move to the odd neighbour on the side of x
      const bool outwards = std::fabs(x) > std::fabs(static_cast<double>(f));
      bits += outwards ? 1 : ~0u;
      f = std::bit_cast<float>(bits);
    }
  }
  return H::narrow(f);
}

template <class H>
uint16_t fma_half(uint16_t a, uint16_t b, uint16_t c) {
  return narrow_double<H>(sum_to_odd(static_cast<double>(H::widen(a)) * H::widen(b), H::widen(c)));
}
template <class H>
uint16_t add_half(uint16_t a, uint16_t b) {
  return narrow_double<H>(sum_to_odd(H::widen(a), H::widen(b)));
}
template <class H>
uint16_t sub_half(uint16_t a, uint16_t b) {
  return narrow_double<H>(sum_to_odd(H::widen(a), -H::widen(b)));
}
template <class H>
uint16_t mul_half(uint16_t a, uint16_t b) {
  return narrow_double<H>(static_cast<double>(H::widen(a)) * H::widen(b));
}

bool is_nan(float x) { return x != x; }

template <class H, bool kMax, bool kNan>
uint16_t extreme(uint16_t a, uint16_t b) {
  const float x = H::widen(a);
  const float y = H::widen(b);
  if (is_nan(x) || is_nan(y)) {
    if (kNan || (is_nan(x) && is_nan(y))) return 0x7FFF;
    return is_nan(x) ? b : a;
  }
  if (x == y) return kMax ? ((a & 0x8000) ? b : a) : ((a & 0x8000) ? a : b);
  return (kMax ? x > y : x < y) ? a : b;
}

template <auto kOne, class... U>
uint32_t packed(U... x) {
  const uint32_t low = kOne(static_cast<uint16_t>(x)...);
  const uint32_t high = kOne(static_cast<uint16_t>(x >> 16)...);
  return low | (high << 16);
}

template <auto kOne>
void add_unary(OpTable& t, const std::string& op, const std::string& type) {
  add_map_float<false, [](uint16_t a) { return kOne(a); }, uint16_t, uint16_t>(t, op + type);
  add_map_float<false, [](uint32_t a) { return packed<kOne>(a); }, uint32_t, uint32_t>(
      t, op + type + "x2");
}
template <auto kOne>
void add_binary(OpTable& t, const std::string& op, const std::string& type) {
  using U = uint32_t;
  add_map_float<false, [](uint16_t a, uint16_t b) { return kOne(a, b); }, uint16_t, uint16_t,
                uint16_t>(t, op + type);
  add_map_float<false, [](U a, U b) { return packed<kOne>(a, b); }, U, U, U>(t, op + type + "x2");
}
template <auto kOne>
void add_ternary(OpTable& t, const std::string& op, const std::string& type) {
  using U = uint32_t;
  using H = uint16_t;
  add_map_float<false, [](H a, H b, H c) { return kOne(a, b, c); }, H, H, H, H>(t, op + type);
  add_map_float<false, [](U a, U b, U c) { return packed<kOne>(a, b, c); }, U, U, U, U>(
      t, op + type + "x2");
}

template <class H>
uint16_t exp2_half(uint16_t a) {
  return narrow_double<H>(std::exp2(static_cast<double>(H::widen(a))));
}

template <class H>
void add_type(OpTable& t, const std::string& type) {
  for (const char* rn : {"", ".rn"}) {
    add_binary<add_half<H>>(t, std::string("add") + rn, type);
    add_binary<sub_half<H>>(t, std::string("sub") + rn, type);
    add_binary<mul_half<H>>(t, std::string("mul") + rn, type);
  }
  add_ternary<fma_half<H>>(t, "fma.rn", type);
  add_binary<extreme<H, false, false>>(t, "min", type);
  add_binary<extreme<H, true, false>>(t, "max", type);
  add_binary<extreme<H, false, true>>(t, "min.NaN", type);
  add_binary<extreme<H, true, true>>(t, "max.NaN", type);
  add_unary<[](uint16_t a) { return static_cast<uint16_t>(a ^ 0x8000); }>(t, "neg", type);
  add_unary<[](uint16_t a) { return static_cast<uint16_t>(a & 0x7FFF); }>(t, "abs", type);
}

}  // namespace

void add_half_ops(OpTable& t) {
  add_type<Fp16>(t, ".f16");
  add_type<Bf16>(t, ".bf16");
  add_unary<exp2_half<Fp16>>(t, "ex2.approx", ".f16");
  add_unary<exp2_half<Bf16>>(t, "ex2.approx.ftz", ".bf16");
}

}  // namespace ptx
