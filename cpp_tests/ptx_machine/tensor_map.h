// Tensor maps: what cuTensorMapEncodeTiled writes into its 128 bytes here, and the walk of a box
// over memory. Swizzles act on absolute shared addresses, as on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ptx {

enum class Swizzle : uint8_t { kNone, k32, k64, k128 };

// The address at which a swizzled access finds its 16 bytes.
inline uint32_t swizzled(uint32_t address, Swizzle mode) {
  switch (mode) {
    case Swizzle::kNone: return address;
    case Swizzle::k32: return address ^ ((address >> 3) & 0x10);
    case Swizzle::k64: return address ^ ((address >> 3) & 0x30);
    case Swizzle::k128: return address ^ ((address >> 3) & 0x70);
  }
  return address;
}

inline constexpr int kMaxRank = 5;

enum class Element : uint8_t { kInteger, kF16, kBf16, kF32, kF64 };

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616D2072737470;
  uint64_t magic = kMagic;
  uint64_t address = 0;
  uint64_t stride[kMaxRank - 1] = {};  // bytes, of dimensions 1 ..
  uint32_t last[kMaxRank] = {};        // elements - 1
  uint16_t box[kMaxRank] = {};
  uint8_t step[kMaxRank] = {};
  uint8_t rank = 0;
  uint8_t element_bytes = 0;
  Element element = Element::kInteger;
  Swizzle swizzle = Swizzle::kNone;
  uint8_t nan_fill = 0;
  uint64_t check = 0;  // over the rest

  uint64_t checksum() const;
  bool is_valid() const { return magic == kMagic && check == checksum(); }

  uint32_t count(int d) const { return d < rank ? (box[d] + step[d] - 1u) / step[d] : 1u; }
  uint32_t row_bytes() const { return uint32_t{box[0]} * element_bytes; }
  uint32_t box_bytes() const { return row_bytes() * count(1) * count(2) * count(3) * count(4); }

  // Calls row(offset in the box, global address of the row's first element, first byte inside the
  // tensor, end of the bytes inside) for every row of the box at `at`. A row that lies outside has
  // first = end = 0.
  template <class Row>
  void for_rows(const int32_t (&at)[kMaxRank], Row&& row) const;
};
static_assert(sizeof(TensorMap) <= 128);

template <class Row>
void TensorMap::for_rows(const int32_t (&at)[kMaxRank], Row&& row) const {
  const int64_t size0 = int64_t{last[0]} + 1;
  const int64_t x0 = std::clamp<int64_t>(-int64_t{at[0]}, 0, box[0]);
  const int64_t x1 = std::clamp<int64_t>(size0 - at[0], x0, box[0]);
  uint32_t offset = 0;
  uint32_t i[kMaxRank] = {};
  for (i[4] = 0; i[4] < count(4); ++i[4])
    for (i[3] = 0; i[3] < count(3); ++i[3])
      for (i[2] = 0; i[2] < count(2); ++i[2])
        for (i[1] = 0; i[1] < count(1); ++i[1]) {
          bool inside = x1 > x0;
          uint64_t place = address + static_cast<uint64_t>(int64_t{at[0]} * element_bytes);
          for (int d = 1; d < rank; ++d) {
            const int64_t c = int64_t{at[d]} + int64_t{i[d]} * step[d];
            inside = inside && c >= 0 && c <= int64_t{last[d]};
            place += static_cast<uint64_t>(c) * stride[d - 1];
          }
          row(offset, place, inside ? static_cast<uint32_t>(x0) * element_bytes : 0u,
              inside ? static_cast<uint32_t>(x1) * element_bytes : 0u);
          offset += row_bytes();
        }
}

}  // namespace ptx
