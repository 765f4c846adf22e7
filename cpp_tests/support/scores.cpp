#include "scores.h"

#include <algorithm>

namespace flashtile::test {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c;
}

uint32_t dropout_bits(const std::array<int64_t, 2>& rng_state, int64_t b, int64_t h, int64_t i,
                      int64_t j) {
  const auto low = [](int64_t n) { return static_cast<uint32_t>(n); };
  const auto high = [](int64_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(n) >> 32); };
  const auto d = philox({low(rng_state[1]), high(rng_state[1]), low(h), low(b)}, low(rng_state[0]),
                        high(rng_state[0]));
  const auto w =
      philox({low(j / 16 * 4 + j % 8 / 2), low(i / 16 * 8 + i % 8), d[2], d[3]}, d[0], d[1]);
  return w[static_cast<size_t>(j % 2 * 2 + j / 8 % 2)] >> (16 * (i / 8 % 2)) & 0xffff;
}

ScoreTensor make_score_tensor(const ScoreSizes& sizes, const Dims& dims, Dtype dtype, bool odd,
                              int key_step) {
  ScoreTensor tensor;
  const Extents e = {dims.batch ? sizes.batch : 1, dims.query ? sizes.queries : 1,
                     dims.head ? sizes.heads : 1, (dims.key ? sizes.keys : 1) * key_step};
  const int64_t gap = odd ? 3 : 0;
  // A row is never 0 long: a stride of 0 would repeat it.
  const int64_t row = odd ? e.dim + gap : std::max<int64_t>((e.dim + 7) / 8 * 8, 8),
                head = row * e.seq + (odd ? 5 : 8);
  tensor.dims = dims;
  tensor.key_step = key_step;
  tensor.dtype = dtype;
  tensor.host =
      HostTensor(dtype, e, Strides{head * e.heads + (odd ? 1 : 16), row, head}, odd ? 1 : 0);
  return tensor;
}

}  // namespace flashtile::test
