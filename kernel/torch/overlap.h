// Whether a tensor that is written shares memory with itself or with one that is read. Answered
// from pointers, sizes and strides; "no" is certain, "yes" may be said of exotic strides that are
// fine.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "sentences.h"

namespace flashtile::ops {

// The bytes of a tensor: begin + any sum of less than size times stride, over all dimensions.
class Footprint {
 public:
  explicit Footprint(const torch::stable::Tensor& tensor)
      : begin_(reinterpret_cast<intptr_t>(tensor.const_data_ptr())), empty_(tensor.numel() == 0) {
    const auto element = static_cast<int64_t>(tensor.element_size());
    dims_.push_back({.stride = 1, .size = element});
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      dims_.push_back({.stride = tensor.stride(dim) * element, .size = tensor.size(dim)});
    }
    std::erase_if(dims_, [](const Dim& dim) { return dim.size == 1; });
    std::ranges::sort(dims_, {}, &Dim::stride);
  }

  // Two elements cannot meet when every stride steps over all that the smaller ones reach.
  bool may_meet_itself() const {
    int64_t reach = 1;
    for (const Dim& dim : dims_) {
      if (dim.stride < reach) return !empty_;
      reach += dim.stride * (dim.size - 1);
    }
    return false;
  }

  // Of a tensor that does not meet itself, so that no stride is 0.
  bool may_meet(const Footprint& other) const {
    if (empty_ || other.empty_) return false;
    const int64_t distance = other.begin_ - begin_;
    if (distance >= reach() || -distance >= other.reach()) return false;
    // Slices of one buffer, like out beside q in a (..., 4, head_dim) of which each owns one:
    // modulo a stride that both have, the two lie in ranges that do not touch.
    return std::ranges::all_of(dims_, [&](const Dim& dim) {
      const int64_t period = dim.stride;
      const int64_t offset = (distance % period + period) % period;
      return offset < reach(period) || offset + other.reach(period) > period;
    });
  }

 private:
  struct Dim {
    int64_t stride, size;  // bytes; entries
  };

  // One more than the furthest byte, counting only the strides that are no multiple of the period.
  int64_t reach(int64_t period = INT64_MAX) const {
    int64_t reach = 1;
    for (const Dim& dim : dims_) {
      if (dim.stride % period != 0) reach += dim.stride * (dim.size - 1);
    }
    return reach;
  }

  intptr_t begin_;
  bool empty_;
  std::vector<Dim> dims_;  // ascending strides, without dimensions of one entry
};

using NamedTensor = std::pair<const char*, const Tensor*>;

inline std::string itself_refusal(const NamedTensor& written) {
  const auto& [name, tensor] = written;
  return sentence(name, " has strides ", tuple_text(tensor->strides()), " over shape ",
                  tuple_text(tensor->sizes()), "; allowed: strides that keep its elements apart");
}

inline std::string sharing_refusal(const char* written, const char* other) {
  return sentence(written, " shares memory with ", other, "; allowed: memory of its own");
}

// That a tensor can be written while others are read.
inline std::string overlap_refusal(const NamedTensor& written,
                                   std::initializer_list<NamedTensor> read) {
  const Footprint footprint(*written.second);
  if (footprint.may_meet_itself()) return itself_refusal(written);
  for (const auto& [name, tensor] : read) {
    if (footprint.may_meet(Footprint(*tensor))) return sharing_refusal(written.first, name);
  }
  return {};
}

}  // namespace flashtile::ops
