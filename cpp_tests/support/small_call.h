// A small attention call that every argument check accepts: what the refusal tests break one by
// one.
#pragma once

#include <cstdint>

#include "flashtile/flashtile.h"

namespace flashtile::test {

// 2 sequences of 4 queries and 6 keys, 4 heads over 2, head dim 8, fp32 on the CPU.
struct SmallCall {
  static constexpr int64_t kBatch = 2, kHeads = 4, kHeadsKv = 2, kQ = 4, kK = 6, kDim = 8;
  static constexpr int64_t kRowsQ = kBatch * kQ, kRowsK = kBatch * kK;

  alignas(256) float lse[kRowsQ * kHeads] = {};  // [batch, heads, seqlen_q]
  flashtile_forward_params forward;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  flashtile_backward_params backward;
  int32_t used_q[2] = {4, 3};
  int32_t used_k[2] = {0, 6};
  int32_t cu_q[3] = {0, 4, 8};
  int32_t cu_k[3] = {0, 6, 12};
  alignas(256) float k[kRowsK * kHeadsKv * kDim] = {};  // [batch, seqlen_k, heads_kv, dim]
  alignas(256) float v[kRowsK * kHeadsKv * kDim] = {};
  alignas(256) float dk[kRowsK * kHeadsKv * kDim] = {};
  alignas(256) float dv[kRowsK * kHeadsKv * kDim] = {};
  alignas(256) float q[kRowsQ * kHeads * kDim] = {};  // [batch, seqlen_q, heads, dim]
  alignas(256) float out[kRowsQ * kHeads * kDim] = {};
  alignas(256) float dout[kRowsQ * kHeads * kDim] = {};
  alignas(256) float dq[kRowsQ * kHeads * kDim] = {};
  alignas(256) unsigned char workspace[1 << 20] = {};

  SmallCall();
  SmallCall(const SmallCall&) = delete;
  SmallCall& operator=(const SmallCall&) = delete;

  // The same tensors as two packed sequences.
  void make_varlen();

  // Not all rows of every sequence are in use.
  void set_seqused();

  static flashtile_tensor queries(float* data) {
    return {data, kQ * kHeads * kDim, kHeads * kDim, kDim};
  }
  static flashtile_tensor keys(float* data) {
    return {data, kK * kHeadsKv * kDim, kHeadsKv * kDim, kDim};
  }
};

}  // namespace flashtile::test
