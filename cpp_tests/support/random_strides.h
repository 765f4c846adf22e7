// Strides that nobody would choose: batch, seq and head in any order, a gap after each, any start.
#pragma once

#include <cstdint>

#include "host_tensor.h"

namespace flashtile::test {

struct Placement {
  Strides strides;
  int64_t start = 0;
};

// What a random placement may do besides: repeat heads, and whole rows and batches, by a stride 0.
struct MayRepeat {
  bool heads = false, rows = false;
};

Placement random_placement(const Extents& extents, uint64_t seed, const MayRepeat& repeat);

}  // namespace flashtile::test
