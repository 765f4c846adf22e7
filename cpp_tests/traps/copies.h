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

  uint8_t* data() const { return memory_; }
  flashtile_tensor view() const {
    return {memory_, host_.strides().batch, host_.strides().seq, host_.strides().head};
  }
  std::vector<double> fetch(int64_t i) {
    large_backend().copy_out(host_.bytes().data(), copy(i), bytes_);
    return host_.dense();
  }
  // Whether all copies have the bits of the first.
  bool are_alike() {
    std::vector<uint8_t> first(bytes_), other(bytes_);
    large_backend().copy_out(first.data(), copy(0), bytes_);
    for (int64_t i = 1; i < copies_; ++i) {
      large_backend().copy_out(other.data(), copy(i), bytes_);
      if (first != other) return false;
    }
    return true;
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
  Copies q(setup.q, copies), k(setup.k, copies), v(setup.v, copies), out(setup.dout, copies),
      dout(setup.dout, copies), dq(setup.q, copies), dk(setup.k, copies), dv(setup.v, copies),
      lse(dense_lse(setup), copies);
  run_large(setup, copies,
            {.q = q.view(),
             .k = k.view(),
             .v = v.view(),
             .out = out.view(),
             .dout = dout.view(),
             .dq = dq.view(),
             .dk = dk.view(),
             .dv = dv.view(),
             .lse = reinterpret_cast<float*>(lse.data())});
  for (Copies* result : {&out, &lse, &dq, &dk, &dv})
    CHECK_MESSAGE(result->are_alike(), setup.name() + ": copies differ");
  const int64_t last = copies - 1;
  const AttentionOutput result = {.out = out.fetch(last),
                                  .lse = lse.fetch(last),
                                  .dq = dq.fetch(last),
                                  .dk = dk.fetch(last),
                                  .dv = dv.fetch(last)};
  const Verdict verdict = compare(setup, Truth(setup), result);
  CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
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
