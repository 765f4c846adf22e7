// A tensor in host memory with odd strides inside a buffer that is NaN wherever the tensor is not,
// so a stray read shows in the result and a stray write in the buffer.
#pragma once

#include <cstdint>
#include <vector>

#include "case.h"
#include "numbers.h"

namespace flashtile::test {

struct Strides {
  int64_t batch = 0, seq = 0, head = 0;  // elements
};

// Extents of a tensor (batch, seq, heads, dim); varlen has batch 1 and seq = all rows.
struct Extents {
  int64_t batch = 1, seq = 0, heads = 1, dim = 1;
  bool empty() const { return batch == 0 || seq == 0; }
};

inline constexpr uint8_t kPoison = 0xff;  // repeated, it is NaN in every dtype

Strides strides_of(Layout layout, const Extents& e);

class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(Dtype dtype, const Extents& extents, Layout layout);
  HostTensor(Dtype dtype, const Extents& extents, const Strides& strides, int64_t start);

  double get(int64_t b, int64_t s, int64_t h, int64_t d) const {
    return load(dtype_, &bytes_[at(b, s, h, d)]);
  }
  void set(int64_t b, int64_t s, int64_t h, int64_t d, double x) {
    store(dtype_, &bytes_[at(b, s, h, d)], x);
  }

  // The heads of one row become poison again, as if nobody had ever written them.
  void poison_row(int64_t b, int64_t s);

  // Calls visit(b, s, h, d) for every element, rows outermost, in the order of dense().
  template <class Visit>
  void for_each(const Visit& visit) const {
    if (extents_.empty()) return;
    for (int64_t b = 0; b < extents_.batch; ++b) {
      for (int64_t s = 0; s < extents_.seq; ++s) {
        for (int64_t h = 0; h < extents_.heads; ++h) {
          for (int64_t d = 0; d < extents_.dim; ++d) visit(b, s, h, d);
        }
      }
    }
  }

  // All elements, [batch * seq, heads, dim].
  std::vector<double> dense() const;

  // Whether every byte that is not the tensor's is still poison.
  bool gaps_are_untouched() const;

  bool is_all_poison() const;

  std::vector<uint8_t>& bytes() { return bytes_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  const Strides& strides() const { return strides_; }
  const Extents& extents() const { return extents_; }
  size_t start_byte() const {
    return static_cast<size_t>(start_) * static_cast<size_t>(bytes_of(dtype_));
  }

 private:
  size_t at(int64_t b, int64_t s, int64_t h, int64_t d) const {
    const int64_t element = start_ + b * strides_.batch + s * strides_.seq + h * strides_.head + d;
    return static_cast<size_t>(element) * static_cast<size_t>(bytes_of(dtype_));
  }

  Dtype dtype_ = Dtype::kFloat16;
  Extents extents_;
  Strides strides_;
  int64_t start_ = 0;
  std::vector<uint8_t> bytes_;
};

}  // namespace flashtile::test
