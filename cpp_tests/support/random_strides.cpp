#include "random_strides.h"

#include <algorithm>
#include <array>
#include <utility>

namespace flashtile::test {

Placement random_placement(const Extents& extents, uint64_t seed, const MayRepeat& repeat) {
  uint64_t state = seed;
  const auto below = [&](uint64_t n) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (z ^ (z >> 31)) % n;
  };
  const int64_t unit = below(2) == 0 ? 8 : 1;  // of gaps: 16 bytes or one element
  const auto gap = [&] { return below(2) == 0 ? 0 : unit * static_cast<int64_t>(below(4)); };
  Placement placement;
  struct Dimension {
    int64_t* stride;
    int64_t extent;
    bool may_repeat;
  };
  std::array<Dimension, 3> order = {{{&placement.strides.batch, extents.batch, repeat.rows},
                                     {&placement.strides.seq, extents.seq, repeat.rows},
                                     {&placement.strides.head, extents.heads, repeat.heads}}};
  for (size_t i = 2; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
  int64_t size = extents.dim + gap();  // of everything further in
  for (const Dimension& dimension : order) {
    if (dimension.may_repeat && below(6) == 0) continue;  // stride 0
    *dimension.stride = size;
    size = size * std::max<int64_t>(1, dimension.extent) + gap();
  }
  placement.start = gap();
  return placement;
}

}  // namespace flashtile::test
