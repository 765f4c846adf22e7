// The tensors of a case's scores, and what manual attention makes of them: the tests' own statement
// of flashtile_scores.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "host_tensor.h"
#include "score_spec.h"

namespace flashtile::test {

// Philox4x32-10, the one of the contract, one element at a time.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1);
uint32_t dropout_bits(const std::array<int64_t, 2>& rng_state, int64_t b, int64_t h, int64_t i,
                      int64_t j);

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

ScoreTensor make_score_tensor(const ScoreSizes& sizes, const Dims& dims, Dtype dtype,
                              bool odd = false, int key_step = 1);

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
