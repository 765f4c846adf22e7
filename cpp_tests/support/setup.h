// A case with dtype, head dims and mask chosen: its tensors in poisoned memory, filled from a seed.
// Rows that are not in use stay poison.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "case.h"
#include "host_tensor.h"
#include "manual_attention.h"
#include "normal.h"
#include "scores.h"

namespace flashtile::test {

struct Setup {
  Case spec;
  Dtype dtype = Dtype::kFloat16;
  int head_dim = 64, head_dim_v = 64;
  Mask mask;
  double softmax_scale = 1.0;
  int64_t batch = 1;                                // sequences
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k;  // varlen, else empty
  std::vector<int32_t> used_q, used_k;              // rows in use, empty: all of a sequence
  std::vector<int32_t> block_table;                 // pages in the order of their rows
  std::vector<int32_t> leftpad;                     // of a cache; used_k counts it
  Extents extents_q, extents_k, extents_v, extents_out;
  HostTensor q, k, v, dout;
  HostTensor dlse;  // dim 1: seq runs fastest
  ScoreInput scores;

  bool forward_only() const {
    return spec.keys_in_cache || spec.dtype_kv.has_value() || spec.values == Values::kHuge ||
           spec.values == Values::kMixedHuge || spec.values == Values::kNan;
  }
  std::string name() const;
};

enum class Role { kQ, kK, kV, kOut, kDout, kGradient };

// An input or an output; index tells apart those of one role.
HostTensor make_tensor(const Setup& setup, Role role, const Extents& extents, uint64_t index = 0);

// softmax_lse and dsoftmax_lse of q in `dtype`: [batch, heads, seq] with gaps after every head and
// batch.
HostTensor make_row_tensor(const Extents& q, Dtype dtype);

void fill(HostTensor& tensor, Normal& normal, double factor);

// Where the sequences' rows in use are.
std::vector<Span> spans_of(const Setup& setup);

// Which rows are in use, in the order of HostTensor::dense().
std::vector<bool> rows_in_use(const Setup& setup, bool keys);

Setup make_setup(const Case& spec, Dtype dtype, const HeadDims& head_dims, const Mask& mask,
                 uint64_t seed = 1);

AttentionInput manual_input(const Setup& setup);

}  // namespace flashtile::test
