#include "small_call.h"

namespace flashtile::test {

SmallCall::SmallCall() {
  problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.batch = kBatch;
  problem.num_heads = kHeads;
  problem.num_heads_kv = kHeadsKv;
  problem.head_dim = kDim;
  problem.seqlen_q = kQ;
  problem.seqlen_k = kK;
  problem.softmax_scale = 0.5f;
  flashtile_forward_init(&forward);
  forward.problem = &problem;
  forward.q = queries(q);
  forward.k = keys(k);
  forward.v = keys(v);
  forward.out = queries(out);
  forward.softmax_lse = lse;
  forward.lse_stride_batch = kHeads * kQ;
  forward.lse_stride_head = kQ;
  forward.workspace = workspace;
  forward.workspace_bytes = sizeof workspace;
  flashtile_backward_init(&backward);
  backward.problem = &problem;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.out = forward.out;
  backward.dout = queries(dout);
  backward.dq = queries(dq);
  backward.dk = keys(dk);
  backward.dv = keys(dv);
  backward.softmax_lse = lse;
  backward.lse_stride_batch = forward.lse_stride_batch;
  backward.lse_stride_head = forward.lse_stride_head;
  backward.workspace = workspace;
  backward.workspace_bytes = sizeof workspace;
}

void SmallCall::make_varlen() {
  problem.cu_seqlens_q = cu_q;
  problem.cu_seqlens_k = cu_k;
  problem.total_q = kRowsQ;
  problem.total_k = kRowsK;
  forward.lse_stride_head = backward.lse_stride_head = kRowsQ;
}

void SmallCall::set_seqused() {
  problem.seqused_q = used_q;
  problem.seqused_k = used_k;
}

}  // namespace flashtile::test
