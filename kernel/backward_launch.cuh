// The backward: three launches on one stream, and the workspace they share.
#pragma once

#include "backward_delta.cuh"
#include "backward_dq.cuh"
#include "backward_sm80.cuh"
#include "launch.cuh"
#include "slices.cuh"

namespace flashtile {

// Parts of the workspace, in bytes from its start.
struct BackwardWorkspace {
  int64_t slots_q = 0;
  int64_t slots_k = 0;
  size_t dq = 0;     // after the statistics
  size_t turns = 0;  // after dq
  size_t bytes = 0;
};

template <int kHeadDim, Memory kMemory>
BackwardWorkspace backward_workspace(const Problem& p) {
  constexpr int kBlockQ = backward_config(kHeadDim, kMemory).block_q;
  constexpr int kBlockK = backward_config(kHeadDim, kMemory).block_k;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;
  constexpr size_t kAlign = 256;
  BackwardWorkspace w;
  w.slots_q = slot_count(p.is_varlen(), p.batch, p.seqlen_q, p.total_q, kBlockQ);
  w.slots_k = slot_count(p.is_varlen(), p.batch, p.seqlen_k, p.total_k, kBlockK);
  const size_t tiles = static_cast<size_t>(w.slots_q * p.num_heads);
  w.dq = (tiles * Slot::kStatistics * sizeof(float) + kAlign - 1) / kAlign * kAlign;
  w.turns = w.dq + tiles * Slot::kDq * sizeof(float);
  w.bytes = w.turns;
  if (p.deterministic) w.bytes += TurnWords::count(w.slots_k * p.num_heads_kv) * sizeof(int);
  return w;
}

template <int kHeadDim, Memory kMemory>
size_t backward_workspace_sm80(const Problem& problem) {
  return backward_workspace<kHeadDim, kMemory>(problem).bytes;
}

template <class T, int kHeadDim, Memory kMemory>
Status launch_backward(const BackwardLaunch& launch_params, CUstream_st* stream) {
  const Problem& p = launch_params.params.problem;
  const int64_t query_blocks = launch_params.slots_q * p.num_heads;
  const int64_t key_blocks = launch_params.slots_k * p.num_heads_kv;
  if (Status s = launch<BackwardDelta<T, kHeadDim, kMemory>>(launch_params, query_blocks, stream))
    return s;
  // Without queries there is no dQ to take turns at, and nobody has set the turns to 0.
  const bool ordered = p.deterministic && query_blocks > 0;
  if (Status s = ordered ? launch<BackwardSm80<T, kHeadDim, kMemory, true>>(launch_params,
                                                                            key_blocks, stream)
                         : launch<BackwardSm80<T, kHeadDim, kMemory, false>>(launch_params,
                                                                             key_blocks, stream)) {
    return s;
  }
  return launch<BackwardDq<T, kHeadDim, kMemory>>(launch_params, query_blocks, stream);
}

template <int kHeadDim, Memory kMemory>
Status launch_backward_sm80(const BackwardParams& params, CUstream_st* stream) {
  using Shape = BackwardShape<kHeadDim, kMemory>;
  const Problem& p = params.problem;
  const BackwardWorkspace workspace = backward_workspace<kHeadDim, kMemory>(p);
  char* const base = static_cast<char*>(params.workspace);
  BackwardLaunch launch_params;
  launch_params.params = params;
  launch_params.statistics = reinterpret_cast<float*>(base);
  launch_params.dq_accumulator = reinterpret_cast<float*>(base + workspace.dq);
  launch_params.turns = reinterpret_cast<int*>(base + workspace.turns);
  launch_params.slots_q = workspace.slots_q;
  launch_params.slots_k = workspace.slots_k;
  launch_params.scale_log2 = p.softmax_scale * kLog2e;
  launch_params.q = query_format(params.q, p, p.head_dim);
  launch_params.k = key_format(params.k, p, p.head_dim);
  launch_params.v = key_format(params.v, p, p.head_dim_v);
  launch_params.out = query_format(params.out, p, p.head_dim_v);
  launch_params.dout = query_format(params.dout, p, p.head_dim_v);
  launch_params.dq = query_format(params.dq, p, p.head_dim);
  launch_params.dk = key_format(params.dk, p, p.head_dim);
  launch_params.dv = key_format(params.dv, p, p.head_dim_v);
  launch_params.plain =
      is_plain(launch_params.q, kHeadDim) && is_plain(launch_params.k, kHeadDim) &&
      is_plain(launch_params.v, kHeadDim) && is_plain(launch_params.dout, kHeadDim);
  launch_params.q_pass_bytes = 2 * Shape::QueryCopy::kRowsPerPass * params.q.stride_seq;
  launch_params.dout_pass_bytes = 2 * Shape::QueryCopy::kRowsPerPass * params.dout.stride_seq;
  return p.dtype == Dtype::kFloat16
             ? launch_backward<__half, kHeadDim, kMemory>(launch_params, stream)
             : launch_backward<__nv_bfloat16, kHeadDim, kMemory>(launch_params, stream);
}

}  // namespace flashtile
