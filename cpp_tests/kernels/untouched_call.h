// Calls whose tensors lie in memory that nobody touches: for what happens on the host alone.
#pragma once

#include <cstdint>

#include "flashtile/flashtile.h"

namespace flashtile::test {

inline constexpr int64_t kHeads = 4, kRows = 128, kBatch = 2, kDim = 128;

// A forward; 2 batches of 128 queries and keys of 4 heads.
struct Call {
  flashtile_problem problem;
  flashtile_forward_params params;

  Call() {
    flashtile_problem_init(&problem);
    problem.device = FLASHTILE_CUDA;
    problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_BFLOAT16;
    problem.batch = kBatch;
    problem.num_heads = problem.num_heads_kv = kHeads;
    problem.head_dim = problem.head_dim_v = kDim;
    problem.seqlen_q = problem.seqlen_k = kRows;
    problem.softmax_scale = 1.0f;
    flashtile_forward_init(&params);
    params.problem = &problem;
    uintptr_t address = 1 << 20;
    for (flashtile_tensor* tensor : {&params.q, &params.k, &params.v, &params.out}) {
      *tensor = {reinterpret_cast<void*>(address), kRows * kHeads * kDim, kHeads * kDim, kDim};
      address += uintptr_t{1} << 52;  // apart, whatever lengths a test asks about
    }
  }
};

struct BackwardCall {
  flashtile_problem problem = Call().problem;
  flashtile_backward_params params;

  BackwardCall() {
    flashtile_backward_init(&params);
    params.problem = &problem;
    uintptr_t address = 1 << 20;
    for (flashtile_tensor* tensor : {&params.q, &params.k, &params.v, &params.out, &params.dout,
                                     &params.dq, &params.dk, &params.dv}) {
      *tensor = {reinterpret_cast<void*>(address), kRows * kHeads * kDim, kHeads * kDim, kDim};
      address += uintptr_t{1} << 52;  // apart, whatever lengths a test asks about
    }
    params.softmax_lse = reinterpret_cast<float*>(address);
    params.lse_stride_batch = kHeads * kRows;
    params.lse_stride_head = kRows;
  }

  // Before a call: as much as it needs, behind the tensors.
  void with_workspace() {
    size_t bytes = 0;
    if (flashtile_workspace_size_backward(&params, &bytes) != FLASHTILE_OK) return;
    params.workspace = reinterpret_cast<void*>(uintptr_t{1} << 30);
    params.workspace_bytes = bytes;
  }
};

}  // namespace flashtile::test
