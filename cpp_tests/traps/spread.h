// Tensors with gaps of any size between their rows, of which only the rows are touched: on the CPU
// pages that the system never makes, on a GPU what cudaMalloc gives.
#pragma once

#include "large_call.h"

namespace flashtile::test {

// A tensor of a setup, copied to strides of its own on the device.
class Spread {
 public:
  Spread(const HostTensor& tensor, Dtype dtype, const Strides& strides)
      : shape_(tensor), dtype_(dtype), strides_(strides) {
    const Extents& e = tensor.extents();
    const int64_t last = (e.batch - 1) * strides.batch + (e.seq - 1) * strides.seq +
                         (e.heads - 1) * strides.head + e.dim;
    memory_ = static_cast<uint8_t*>(
        large_backend().allocate(static_cast<size_t>(last) * static_cast<size_t>(bytes_of(dtype))));
    for_each_row([&](int64_t b, int64_t s, int64_t h) {
      large_backend().copy_in(at(b, s, h), row(b, s, h).data(), row_bytes());
    });
  }
  Spread(const Spread&) = delete;
  Spread& operator=(const Spread&) = delete;
  ~Spread() { large_backend().release(memory_); }

  flashtile_tensor view() const { return {memory_, strides_.batch, strides_.seq, strides_.head}; }

  // In the order of HostTensor::dense().
  std::vector<double> fetch() const {
    std::vector<double> values;
    std::vector<uint8_t> bytes(row_bytes());
    for_each_row([&](int64_t b, int64_t s, int64_t h) {
      large_backend().copy_out(bytes.data(), at(b, s, h), row_bytes());
      for (size_t i = 0; i < bytes.size(); i += static_cast<size_t>(bytes_of(dtype_)))
        values.push_back(load(dtype_, &bytes[i]));
    });
    return values;
  }

 private:
  template <class Visit>
  void for_each_row(const Visit& visit) const {
    const Extents& e = shape_.extents();
    for (int64_t b = 0; b < e.batch; ++b) {
      for (int64_t s = 0; s < e.seq; ++s) {
        for (int64_t h = 0; h < e.heads; ++h) visit(b, s, h);
      }
    }
  }
  std::vector<uint8_t> row(int64_t b, int64_t s, int64_t h) const {
    std::vector<uint8_t> bytes(row_bytes());
    for (int64_t d = 0; d < shape_.extents().dim; ++d)
      store(dtype_, &bytes[static_cast<size_t>(d * bytes_of(dtype_))], shape_.get(b, s, h, d));
    return bytes;
  }
  size_t row_bytes() const { return static_cast<size_t>(shape_.extents().dim * bytes_of(dtype_)); }
  uint8_t* at(int64_t b, int64_t s, int64_t h) const {
    return memory_ + (b * strides_.batch + s * strides_.seq + h * strides_.head) * bytes_of(dtype_);
  }

  HostTensor shape_;
  Dtype dtype_;
  Strides strides_;
  uint8_t* memory_ = nullptr;
};

// Strides of q, out, dout, dq and of k, v, dk, dv.
inline void check_spread(const Setup& setup, const Strides& queries, const Strides& keys) {
  check_placed(setup, setup.batch, [&](const HostTensor& tensor, Rows rows) {
    if (rows == Rows::kLse) return Spread(tensor, Dtype::kFloat32, tensor.strides());
    return Spread(tensor, setup.dtype, rows == Rows::kKeys ? keys : queries);
  });
}

}  // namespace flashtile::test
