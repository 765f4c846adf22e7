#include "host_tensor.h"

#include <algorithm>
#include <cstring>

namespace flashtile::test {

Strides strides_of(Layout layout, const Extents& e) {
  switch (layout) {
    case Layout::kHeadMajor: return {e.heads * e.seq * e.dim, e.dim, e.seq * e.dim};
    case Layout::kSeqMajor: return {e.heads * e.dim, e.batch * e.heads * e.dim, e.dim};
    case Layout::kPadded: {
      const int64_t head = e.dim + 16, row = e.heads * head + 24;
      return {e.seq * row + 40, row, head};
    }
    case Layout::kOdd: {
      const int64_t head = e.dim + 3, row = e.heads * head + 5;
      return {e.seq * row + 7, row, head};
    }
    default: return {e.seq * e.heads * e.dim, e.heads * e.dim, e.dim};
  }
}

HostTensor::HostTensor(Dtype dtype, const Extents& extents, Layout layout)
    : HostTensor(dtype, extents, strides_of(layout, extents),
                 layout == Layout::kPadded ? 16
                 : layout == Layout::kOdd  ? 1
                                           : 0) {}

HostTensor::HostTensor(Dtype dtype, const Extents& extents, const Strides& strides, int64_t start)
    : dtype_(dtype), extents_(extents), strides_(strides), start_(start) {
  if (extents.empty()) return;
  const auto forward = [](int64_t count, int64_t stride) {
    return std::max<int64_t>((count - 1) * stride, 0);
  };
  const int64_t end = start + forward(extents.batch, strides.batch) +
                      forward(extents.seq, strides.seq) + forward(extents.heads, strides.head) +
                      extents.dim;
  bytes_.assign(static_cast<size_t>(end) * static_cast<size_t>(bytes_of(dtype)), kPoison);
}

void HostTensor::poison_row(int64_t b, int64_t s) {
  const size_t head_bytes =
      static_cast<size_t>(extents_.dim) * static_cast<size_t>(bytes_of(dtype_));
  for (int64_t h = 0; h < extents_.heads; ++h)
    std::memset(&bytes_[at(b, s, h, 0)], kPoison, head_bytes);
}

std::vector<double> HostTensor::dense() const {
  std::vector<double> values;
  for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) { values.push_back(get(b, s, h, d)); });
  return values;
}

bool HostTensor::gaps_are_untouched() const {
  std::vector<bool> owned(bytes_.size(), false);
  for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    for (int i = 0; i < bytes_of(dtype_); ++i)
      owned[at(b, s, h, d) + static_cast<size_t>(i)] = true;
  });
  for (size_t i = 0; i < bytes_.size(); ++i) {
    if (!owned[i] && bytes_[i] != kPoison) return false;
  }
  return true;
}

bool HostTensor::is_all_poison() const {
  return std::all_of(bytes_.begin(), bytes_.end(), [](uint8_t b) { return b == kPoison; });
}

}  // namespace flashtile::test
