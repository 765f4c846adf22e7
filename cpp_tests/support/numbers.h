// The four dtypes as the tests see them: bits in memory, a double in arithmetic, and rounding.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace flashtile::test {

enum class Dtype { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"fp16", "bf16", "fp32", "fp64"};
  return kNames[static_cast<int>(dtype)];
}

inline int bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Distance of 1 and the next number.
inline double epsilon_of(Dtype dtype) {
  constexpr int kMantissaBits[] = {10, 7, 23, 52};
  return std::ldexp(1.0, -kMantissaBits[static_cast<int>(dtype)]);
}

// Nearest number with 1 + kMantissa significant bits (ties to even), without an overflow check.
template <int kMantissa>
double round_significand(double x) {
  constexpr int kDropped = 52 - kMantissa;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint64_t half = (uint64_t{1} << (kDropped - 1)) - 1 + ((bits >> kDropped) & 1);
  return std::bit_cast<double>((bits + half) >> kDropped << kDropped);
}

inline double round_to_half(double x) {
  constexpr double kSmallestNormal = 0x1p-14, kDenormalStep = 0x1p-24, kOverflow = 65520.0;
  if (!std::isfinite(x)) return x;
  if (std::fabs(x) < kSmallestNormal) return std::nearbyint(x / kDenormalStep) * kDenormalStep;
  if (std::fabs(x) >= kOverflow) return std::copysign(std::numeric_limits<double>::infinity(), x);
  return round_significand<10>(x);
}

inline double round_to_bfloat(double x) {
  if (!std::isfinite(x)) return x;
  const double rounded = round_significand<7>(x);
  constexpr double kLargest = 0x1.fep127;
  if (std::fabs(rounded) > kLargest)
    return std::copysign(std::numeric_limits<double>::infinity(), x);
  return rounded;  // denormals keep more bits than they should: the tests have none
}

inline double round_to(Dtype dtype, double x) {
  switch (dtype) {
    case Dtype::kFloat16: return round_to_half(x);
    case Dtype::kBFloat16: return round_to_bfloat(x);
    case Dtype::kFloat32: return static_cast<float>(x);
    case Dtype::kFloat64: return x;
  }
  return x;
}

// Bits of a finite number that is exactly representable, of an infinity, or of NaN.
inline uint16_t half_bits(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (magnitude < 0x1p-14)
    return static_cast<uint16_t>(sign | static_cast<int>(magnitude * 0x1p24));
  const uint64_t bits = std::bit_cast<uint64_t>(magnitude);
  const int exponent = static_cast<int>(bits >> 52) - 1023 + 15;
  return static_cast<uint16_t>(sign | (exponent << 10) | ((bits >> 42) & 0x3ff));
}

inline double half_value(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 0x1f)
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * mantissa * 0x1p-24;
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

inline void store(Dtype dtype, void* memory, double x) {
  const double rounded = round_to(dtype, x);
  if (dtype == Dtype::kFloat64) {
    std::memcpy(memory, &rounded, 8);
  } else if (dtype == Dtype::kFloat32) {
    const float value = static_cast<float>(rounded);
    std::memcpy(memory, &value, 4);
  } else {
    const uint16_t bits =
        dtype == Dtype::kFloat16
            ? half_bits(rounded)
            : static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(rounded)) >> 16);
    std::memcpy(memory, &bits, 2);
  }
}

inline double load(Dtype dtype, const void* memory) {
  if (dtype == Dtype::kFloat64) {
    double value;
    std::memcpy(&value, memory, 8);
    return value;
  }
  if (dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, memory, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, memory, 2);
  return dtype == Dtype::kFloat16
             ? half_value(bits)
             : static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
}

}  // namespace flashtile::test
