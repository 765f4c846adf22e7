// Offsets beyond 2^31 elements, in memory of which only the rows are ever touched: on the CPU pages
// that the system never makes, on a GPU what cudaMalloc gives. The PTX machine would have to fill
// it.
#include "large_call.h"

using namespace flashtile::test;

namespace {

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
void check_spread(const Setup& setup, const Strides& queries, const Strides& keys) {
  const Dtype dtype = setup.dtype;
  const Spread q(setup.q, dtype, queries), out(setup.dout, dtype, queries),
      dout(setup.dout, dtype, queries), dq(setup.q, dtype, queries);
  const Spread k(setup.k, dtype, keys), v(setup.v, dtype, keys), dk(setup.k, dtype, keys),
      dv(setup.v, dtype, keys);
  DeviceTensor lse(large_backend(), dense_lse(setup));
  run_large(setup, setup.batch,
            {.q = q.view(),
             .k = k.view(),
             .v = v.view(),
             .out = out.view(),
             .dout = dout.view(),
             .dq = dq.view(),
             .dk = dk.view(),
             .dv = dv.view(),
             .lse = reinterpret_cast<float*>(lse.data())});
  const AttentionOutput result = {.out = out.fetch(),
                                  .lse = lse.fetch().dense(),
                                  .dq = dq.fetch(),
                                  .dk = dk.fetch(),
                                  .dv = dv.fetch()};
  const Verdict verdict = compare(setup, Truth(setup), result);
  CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
}

}  // namespace

TEST("L3 batches of keys 2^30 elements apart") {
  const Setup setup =
      make_setup({.name = "L3", .batch = 3, .seqlen_q = 2, .seqlen_k = 300, .dlse = false},
                 Dtype::kFloat16, 64, kCausal);
  check_spread(setup, {128, 64, 64}, {int64_t{1} << 30, 64, 64});
}

// Of all sequences side by side, the first and the last: the others belong to somebody else.
TEST("L6 keys of 24,000 rows, 700 sequences side by side: the last of them") {
  constexpr int64_t kRow = 700 * 128;
  const Setup setup =
      make_setup({.name = "L6", .batch = 2, .seqlen_q = 2, .seqlen_k = 24000, .dlse = false},
                 Dtype::kFloat16, 128, kCausal);
  check_spread(setup, {128, 256, 128}, {699 * 128, kRow, 128});
}

TEST("L7 heads just under and over 2^31 elements apart") {
  const Setup setup = make_setup(
      {.name = "L7", .heads = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70, .dlse = false},
      Dtype::kFloat16, 64, kCausal);
  for (const int64_t head : {(int64_t{1} << 31) - 8, (int64_t{1} << 31) + 8})
    check_spread(setup, {128, 64, head}, {128, 64, head});
}
