// Vectors of one instruction set, in the vector types that GCC and Clang share. This header and the
// ones that include it are compiled once per instruction set: FLASHTILE_CPU_ISA names the namespace
// (portable, avx2, avx512), and nothing that they define, not even an inline function of the
// standard library, may be shared between two of those objects, or the linker could keep the copy
// that this processor cannot execute.
#pragma once

#include <cstdint>

#include "ieee.h"

#ifndef FLASHTILE_CPU_ISA
#error "compile this file with -DFLASHTILE_CPU_ISA=<namespace>"
#endif

#define FLASHTILE_INLINE [[gnu::always_inline]] inline

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class C>
struct VecTypes;
template <>
struct VecTypes<float> {
  using Integer = int32_t;
  typedef float Type __attribute__((vector_size(kVecBytes)));
  typedef int32_t IntegerType __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  using Integer = int64_t;
  typedef double Type __attribute__((vector_size(kVecBytes)));
  typedef int64_t IntegerType __attribute__((vector_size(kVecBytes)));
};

template <class C>
using Vec = typename VecTypes<C>::Type;
template <class C>
using IntVec = typename VecTypes<C>::IntegerType;
template <class C>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(C));

template <class C>
FLASHTILE_INLINE Vec<C> load(const C* from) {
  Vec<C> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class C>
FLASHTILE_INLINE void store(C* to, Vec<C> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class C>
FLASHTILE_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};  // x - 0 is x for every x, -0 included, so this costs one broadcast
}

template <class To, class From>
FLASHTILE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Per lane; where either side is NaN the result is b.
template <class C>
FLASHTILE_INLINE Vec<C> larger(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// The lane numbers 0, 1, 2, ...
template <class C>
FLASHTILE_INLINE IntVec<C> lane_numbers() {
  IntVec<C> v{};
  for (int i = 0; i < kLanes<C>; ++i) v[i] = i;
  return v;
}

// Lanes reduced in a fixed tree, so that the result depends on the vector width alone.
template <class C>
FLASHTILE_INLINE C sum_of_lanes(Vec<C> v) {
  C lane[kLanes<C>];
  store(lane, v);
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

template <class C>
FLASHTILE_INLINE C largest_lane(Vec<C> v) {
  C lane[kLanes<C>];
  store(lane, v);
  C result = lane[0];
  for (int i = 1; i < kLanes<C>; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}

FLASHTILE_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
FLASHTILE_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
FLASHTILE_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
FLASHTILE_INLINE int64_t round_down(int64_t n, int64_t multiple) { return n / multiple * multiple; }

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
