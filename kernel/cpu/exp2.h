// 2^(t * factor) per lane: t * factor = n + r with integer n and |r| <= 1/2, 2^r by a minimax
// polynomial (relative error 7.5e-8 at degree 5, 1.9e-9 at degree 6, 3e-18 at degree 11), 2^n by
// building its bits. Where the processor has fused multiply-add, the factor is free and exact.
//
// Results below 2^-125.5 (double: 2^-1021.5) are 0: some would be denormals, which cost a hundred
// cycles each. t = -inf gives 0, NaN gives NaN; factor > 0. The caller keeps t * factor below 128
// (1024 for double).
#pragma once

#include "vec.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class C, int kDegree>
struct Exp2Terms;
template <>
struct Exp2Terms<float, 5> {
  static constexpr float kTerm[] = {1.0000000716457142836f,  0.69314696709554907614f,
                                    0.24022119755112491638f, 0.055507132264042488349f,
                                    0.0096755403991503300f,  0.0013276487050971838887f};
};
template <>
struct Exp2Terms<float, 6> {
  static constexpr float kTerm[] = {1.0000000005541099043f,    0.6931472057348867691f,
                                    0.24022646890115522198f,   0.055503287816624155876f,
                                    0.0096184890609642343f,    0.0013399929818629382898f,
                                    0.00015345779771296524524f};
};
template <>
struct Exp2Terms<double, 11> {
  static constexpr double kTerm[] = {
      0.9999999999999999971,     0.6931471805599453304,      0.24022650695910156171,
      0.055504108664819926434,   0.0096181291075883477941,   0.0013333558146788773461,
      0.00015403530462498820296, 0.000015252733491096090395, 1.3215433097307574654e-6,
      1.0178197558846428875e-7,  7.0741043418275163482e-9,   4.4353523518648835224e-10};
};

template <class C>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  static constexpr int kFractionBits = 23, kBias = 127;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct FloatFormat<double> {
  static constexpr int kFractionBits = 52, kBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
};

template <class C, int kDegree>
FLASHTILE_INLINE Vec<C> exp2(Vec<C> t, C factor = 1) {
  using Format = FloatFormat<C>;
  const Vec<C> shifted = t * factor + Format::kRounder;
  const Vec<C> r = t * factor - (shifted - Format::kRounder);
  // The low bits of `shifted` hold n; moved to the exponent field they are n in the right place.
  const IntVec<C> bits = bit_cast<IntVec<C>>(shifted) + Format::kBias;
  const Vec<C> power = bit_cast<Vec<C>>(bits << Format::kFractionBits);
  Vec<C> sum = splat<C>(Exp2Terms<C, kDegree>::kTerm[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) sum = sum * r + Exp2Terms<C, kDegree>::kTerm[i];
  const IntVec<C> too_small = shifted <= Format::kRounder + (1 - Format::kBias);
  return bit_cast<Vec<C>>(bit_cast<IntVec<C>>(sum * power) & ~too_small);
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
