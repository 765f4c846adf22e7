// How a handler is made from a function of one lane. The loops run over all 32 lanes and are meant
// to be vectorised; results of lanes outside the mask are dropped.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "decode.h"
#include "warp.h"

namespace ptx {

// Registers of 16 bits live in 32-bit slots with the upper half zero.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 2 || sizeof(T) == 1, uint32_t, T>;

template <class T>
Stored<T> to_stored(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<uint16_t>(x);
  else if constexpr (sizeof(T) == 1)
    return static_cast<uint8_t>(x);
  else
    return x;
}

template <class T>
void store_lanes(T* __restrict to, const T* __restrict from, uint32_t mask) {
  if (mask == kAllLanes) {
    std::memcpy(to, from, sizeof(T) * kLanes);
    return;
  }
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    to[l] = from[l];
  }
}

inline void store_pred(uint32_t& to, uint32_t value, uint32_t mask) {
  to = (to & ~mask) | (value & mask);
}

// Bit l of the result is set where x[l] != 0; x[l] is 0 or 1.
inline uint32_t pack_bits(const uint32_t* x) {
  uint32_t bits = 0;
#if defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8) {
    const __m256i v =
        _mm256_slli_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(x + i)), 31);
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v))) << i;
  }
#else
  for (int l = 0; l < kLanes; ++l) bits |= x[l] << l;
#endif
  return bits;
}

// .ftz instructions run with the host's flush-to-zero and denormals-are-zero modes.
inline void set_ftz(bool on) {
#if defined(__x86_64__)
  static bool current = false;
  if (current == on) return;
  current = on;
  constexpr uint32_t kBits = 0x8040;
  const uint32_t csr = _mm_getcsr();
  _mm_setcsr(on ? csr | kBits : csr & ~kBits);
  asm volatile("" ::: "memory");
#else
  (void)on;
#endif
}

template <auto kFunction, class D, class... S, size_t... I>
inline void map_lanes(Warp& warp, const Inst& inst, uint32_t mask, std::index_sequence<I...>) {
  const std::tuple<const Stored<S>*...> from{warp.at<const Stored<S>>(inst.operand[I + 1])...};
  alignas(64) Stored<D> result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    result[l] = to_stored<D>(static_cast<D>(kFunction(static_cast<S>(std::get<I>(from)[l])...)));
  }
  store_lanes(warp.at<Stored<D>>(inst.operand[0]), result, mask);
}

// d = f(s...): one result register, all sources registers.
template <auto kFunction, class D, class... S>
void map(Warp& warp, const Inst& inst, uint32_t mask) {
  map_lanes<kFunction, D, S...>(warp, inst, mask, std::index_sequence_for<S...>{});
}

template <bool kFtz, auto kFunction, class D, class... S>
void map_float(Warp& warp, const Inst& inst, uint32_t mask) {
  set_ftz(kFtz);
  map_lanes<kFunction, D, S...>(warp, inst, mask, std::index_sequence_for<S...>{});
}

// The letter of a register that holds a T.
template <class T>
constexpr char letter_of() {
  return sizeof(T) == 8 ? 'd' : sizeof(T) == 4 ? 'r' : 'h';
}

template <class D, class... S>
std::string signature_of() {
  std::string s{letter_of<D>(), '='};
  (s.push_back(letter_of<S>()), ...);
  return s;
}

template <auto kFunction, class D, class... S>
void add_map(OpTable& table, const std::string& opcode) {
  table.add(opcode, signature_of<D, S...>(), map<kFunction, D, S...>);
}
template <bool kFtz, auto kFunction, class D, class... S>
void add_map_float(OpTable& table, const std::string& opcode) {
  table.add(opcode, signature_of<D, S...>(), map_float<kFtz, kFunction, D, S...>);
}

}  // namespace ptx
