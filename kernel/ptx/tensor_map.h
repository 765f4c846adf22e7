// The tensor map that TMA instructions name.
#pragma once

#include <cstdint>

namespace flashtile {

// CUtensorMap of cuda.h, which the core does not include: 128 bytes that the driver fills in.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 64);

}  // namespace flashtile
