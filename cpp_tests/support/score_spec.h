// What stands between Q K^T and V in a test case.
#pragma once

#include <array>
#include <cstdint>

#include "numbers.h"

namespace flashtile::test {

// Which dimensions a tensor of scores has; the others are repeated.
struct Dims {
  bool batch = true, head = true, query = true, key = true;
};

struct BiasSpec {
  bool exists = false;
  Dims dims = {};
  Dtype dtype = Dtype::kFloat32;
  bool odd = false;         // rows begin anywhere; else they are 16-byte aligned
  int key_step = 1;         // stride of the keys
  double hidden = 0;        // share of -inf
  bool hides_rows = false;  // every third row is all -inf
};
enum class MaskKind { kNone, kBool, kBits };
struct MaskSpec {
  MaskKind kind = MaskKind::kNone;
  Dims dims = {};
  double hidden = 0.3;
  bool hides_rows = false;
};
enum class SinkKind { kNone, kHead, kBatchHead, kQuery };

struct ScoreSpec {
  double softcap = 0;
  BiasSpec bias[2] = {};
  int alibi = 0;  // dimensions: 1 heads, 2 batch and heads
  MaskSpec mask = {};
  SinkKind sink = SinkKind::kNone;
  Dtype sink_dtype = Dtype::kFloat32;
  Dtype exact_dtype = Dtype::kFloat32;  // of slopes and query_scale
  double dropout_p = 0;
  std::array<int64_t, 2> rng_state = {0x123456789abcdef, -77};
  bool query_scale = false;
  bool max_logit = false;

  bool exist() const {
    return softcap != 0 || bias[0].exists || bias[1].exists || alibi != 0 ||
           mask.kind != MaskKind::kNone || sink != SinkKind::kNone || dropout_p > 0 ||
           query_scale || max_logit;
  }
  bool hides_keys() const {
    return bias[0].exists || bias[1].exists || mask.kind != MaskKind::kNone;
  }
};

}  // namespace flashtile::test
