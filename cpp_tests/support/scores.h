// The tensors of a case's scores, and what manual attention makes of them: the tests' own statement
// of flashtile_scores.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "host_tensor.h"
#include "score_spec.h"

namespace flashtile::test {

// Philox4x32-10, the one of the contract, one element at a time.
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c;
}
inline uint32_t dropout_bits(const std::array<int64_t, 2>& rng_state, int64_t b, int64_t h,
                             int64_t i, int64_t j) {
  const auto low = [](int64_t n) { return static_cast<uint32_t>(n); };
  const auto high = [](int64_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(n) >> 32); };
  const auto d = philox({low(rng_state[1]), high(rng_state[1]), low(h), low(b)}, low(rng_state[0]),
                        high(rng_state[0]));
  const auto w =
      philox({low(j / 16 * 4 + j % 8 / 2), low(i / 16 * 8 + i % 8), d[2], d[3]}, d[0], d[1]);
  return w[static_cast<size_t>(j % 2 * 2 + j / 8 % 2)] >> (16 * (i / 8 % 2)) & 0xffff;
}

// A tensor of scores in poisoned memory. Its keys are the dim of a HostTensor.
struct ScoreTensor {
  HostTensor host;
  Dims dims;
  int key_step = 1;
  Dtype dtype = Dtype::kFloat32;

  bool exists() const { return !host.bytes().empty(); }
  double get(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return host.get(dims.batch ? b : 0, dims.query ? i : 0, dims.head ? h : 0,
                    dims.key ? j * key_step : 0);
  }
  void set(int64_t b, int64_t h, int64_t i, int64_t j, double x) {
    host.set(b, i, h, j * key_step, x);
  }
};

// Sizes that tensors of scores reach over: sequences, heads, the longest queries and keys.
struct ScoreSizes {
  int64_t batch, heads, queries, keys;
};

inline ScoreTensor make_score_tensor(const ScoreSizes& sizes, const Dims& dims, Dtype dtype,
                                     bool odd = false, int key_step = 1) {
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

// The tensors of a case, filled.
struct ScoreInput {
  ScoreSpec spec;
  ScoreTensor bias[2], alibi, sink, query_scale;
  ScoreTensor mask;                                     // 1 seen, 0 hidden, as numbers
  std::vector<uint8_t> bytes;                           // of the mask, as a call is given it
  int64_t mask_row = 0, mask_head = 0, mask_batch = 0;  // strides

  double added(int n, int64_t b, int64_t h, int64_t i, int64_t j) const {
    return bias[n].exists() ? bias[n].get(b, h, i, j) : 0.0;
  }
  bool shows(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return !mask.exists() || mask.get(b, h, i, j) != 0;
  }
  double slope(int64_t b, int64_t h) const { return alibi.exists() ? alibi.get(b, h, 0, 0) : 0.0; }
  // `row`: of q, in varlen counted over all sequences.
  double sink_of(int64_t b, int64_t h, int64_t row) const {
    return sink.exists() ? sink.get(b, h, row, 0) : -std::numeric_limits<double>::infinity();
  }
  double scale_of(int64_t b, int64_t row) const {
    return query_scale.exists() ? query_scale.get(b, 0, row, 0) : 1.0;
  }
  bool keeps(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (spec.dropout_p == 0) return true;
    return dropout_bits(spec.rng_state, b, h, i, j) >=
           static_cast<uint32_t>(std::lround(spec.dropout_p * 65536));
  }
  double drop_scale() const { return spec.dropout_p < 1 ? 1 / (1 - spec.dropout_p) : 0.0; }
};

}  // namespace flashtile::test
