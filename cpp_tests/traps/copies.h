// Many sequences that all hold the same rows, so that one of them says what all the others must be,
// bit for bit, and that one is compared with fp64.
#pragma once

#include "large_call.h"

namespace flashtile::test {

// `copies` of the one batch of a setup, side by side.
class Copies {
 public:
  Copies(const HostTensor& one, int64_t copies)
      : host_(one), copies_(copies), bytes_(one.bytes().size()) {
    memory_ = static_cast<uint8_t*>(large_backend().allocate(bytes_ * static_cast<size_t>(copies)));
    for (int64_t i = 0; i < copies; ++i)
      large_backend().copy_in(copy(i), one.bytes().data(), bytes_);
  }
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;
  ~Copies() { large_backend().release(memory_); }

  flashtile_tensor view() const {
    return {memory_, host_.strides().batch, host_.strides().seq, host_.strides().head};
  }
  // The last copy, whose bits all others must have.
  std::vector<double> fetch() const {
    HostTensor last = host_;
    std::vector<uint8_t> other(bytes_);
    large_backend().copy_out(last.bytes().data(), copy(copies_ - 1), bytes_);
    int64_t unlike = 0;
    for (int64_t i = 0; i < copies_ - 1; ++i) {
      large_backend().copy_out(other.data(), copy(i), bytes_);
      unlike += other != last.bytes();
    }
    CHECK_EQ(unlike, int64_t{0});
    return last.dense();
  }

 private:
  uint8_t* copy(int64_t i) const { return memory_ + static_cast<size_t>(i) * bytes_; }

  HostTensor host_;
  int64_t copies_;
  size_t bytes_;
  uint8_t* memory_ = nullptr;
};

// `setup` is one deterministic dense batch; runs `copies` of it at once.
inline void check_copies(const Setup& setup, int64_t copies) {
  check_placed(setup, copies,
               [&](const HostTensor& tensor, Rows) { return Copies(tensor, copies); });
}

inline Setup one_batch(int heads, int queries, int keys, int head_dim,
                       Values values = Values::kNormal) {
  return make_setup({.name = "one of many",
                     .heads = heads,
                     .heads_kv = heads,
                     .seqlen_q = queries,
                     .seqlen_k = keys,
                     .values = values,
                     .dlse = false,
                     .deterministic = true},
                    Dtype::kFloat16, head_dim, kCausal);
}

}  // namespace flashtile::test
