// The workspace of the backward and what its launches have in common, whatever the main kernel.
#pragma once

#include "backward/delta.cuh"
#include "backward/dq.cuh"
#include "launch.cuh"
#include "tile/scores.cuh"

namespace flashtile {

// Parts of the workspace, in bytes from its start.
struct BackwardWorkspace {
  int64_t slots_q = 0;
  int64_t slots_k = 0;
  size_t dq = 0;     // after the statistics
  size_t turns = 0;  // after dq
  size_t bytes = 0;
};

// kTurns: how many of TurnWords a block of keys has.
template <int kBlockQ, int kBlockK, int kHeadDim, int kTurns>
BackwardWorkspace backward_workspace(const Problem& p) {
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;
  constexpr size_t kAlign = 256;
  BackwardWorkspace w;
  w.slots_q = slot_count(p.is_varlen(), p.batch, p.seqlen_q, p.total_q, kBlockQ);
  w.slots_k = slot_count(p.is_varlen(), p.batch, p.seqlen_k, p.total_k, kBlockK);
  const size_t tiles = static_cast<size_t>(w.slots_q * p.num_heads);
  w.dq = (tiles * Slot::kStatistics * sizeof(float) + kAlign - 1) / kAlign * kAlign;
  w.turns = w.dq + tiles * Slot::kDq * sizeof(float);
  w.bytes = w.turns;
  if (p.deterministic)
    w.bytes += TurnWords::count(kTurns * w.slots_k * p.num_heads_kv) * sizeof(int);
  return w;
}

inline BackwardLaunch backward_launch(const BackwardParams& params,
                                      const BackwardWorkspace& workspace) {
  const Problem& p = params.problem;
  char* const base = static_cast<char*>(params.workspace);
  BackwardLaunch launch;
  launch.params = params;
  launch.statistics = reinterpret_cast<float*>(base);
  launch.dq_accumulator = reinterpret_cast<float*>(base + workspace.dq);
  launch.turns = reinterpret_cast<int*>(base + workspace.turns);
  launch.slots_q = workspace.slots_q;
  launch.slots_k = workspace.slots_k;
  launch.scale_log2 = p.softmax_scale * kLog2e;
  launch.q = query_format(params.q, p, p.head_dim);
  launch.k = key_format(params.k, p, p.head_dim);
  launch.v = key_format(params.v, p, p.head_dim_v);
  launch.out = query_format(params.out, p, p.head_dim_v);
  launch.dout = query_format(params.dout, p, p.head_dim_v);
  launch.dq = query_format(params.dq, p, p.head_dim);
  launch.dk = key_format(params.dk, p, p.head_dim);
  launch.dv = key_format(params.dv, p, p.head_dim_v);
  return launch;
}

// The same of a kernel with scores, or as it is.
template <class Policy>
typename Policy::template WithScores<BackwardLaunch> with_scores(const BackwardLaunch& base,
                                                                 const Scores& scores) {
  if constexpr (Policy::kModifies) {
    typename Policy::template WithScores<BackwardLaunch> launch{
        base, score_params(base.params.problem, scores)};
    if (launch.scores.scales) launch.scale_log2 = 1.0f;
    return launch;
  } else {
    return base;
  }
}

}  // namespace flashtile
