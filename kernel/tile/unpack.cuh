// Pairs of 16-bit elements as they lie in a register.
#pragma once

#include "../ptx/common.cuh"

namespace flashtile {

// As fp32: the lower half first.
template <class T>
FLASHTILE_DEVICE float2 unpack(uint32_t x);
template <>
FLASHTILE_DEVICE float2 unpack<__nv_bfloat16>(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
FLASHTILE_DEVICE float2 unpack<__half>(uint32_t x) {
  return __half22float2(__half2(__builtin_bit_cast(__half2_raw, x)));
}

}  // namespace flashtile
