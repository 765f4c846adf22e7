// Forward and backward of a setup on tensors that the caller has placed in large memory.
#pragma once

#include <algorithm>

#include "large_memory.h"
#include "target.h"

namespace flashtile::test {

struct LargeTensors {
  flashtile_tensor q, k, v, out, dout, dq, dk, dv;
  float* lse = nullptr;  // [batch, heads, seqlen_q]
};

// `batch` sequences like the setup's. Everything but the tensors comes from the setup.
inline void run_large(const Setup& setup, int64_t batch, const LargeTensors& t) {
  const Backend& backend = large_backend();
  const Extents& queries = setup.extents_q;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = backend.device;
  problem.dtype = problem.dtype_kv = problem.dtype_out = static_cast<flashtile_dtype>(setup.dtype);
  problem.batch = batch;
  problem.num_heads = queries.heads;
  problem.num_heads_kv = setup.extents_k.heads;
  problem.head_dim = setup.head_dim;
  problem.seqlen_q = problem.total_q = queries.seq;
  problem.seqlen_k = problem.total_k = setup.extents_k.seq;
  const auto bytes = [](const std::vector<int32_t>& x) { return x.size() * sizeof(int32_t); };
  const DeviceBytes cu_q(backend, setup.cu_seqlens_q.data(), bytes(setup.cu_seqlens_q)),
      cu_k(backend, setup.cu_seqlens_k.data(), bytes(setup.cu_seqlens_k));
  problem.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_q.data());
  problem.cu_seqlens_k = reinterpret_cast<const int32_t*>(cu_k.data());
  problem.softmax_scale = static_cast<float>(setup.softmax_scale);
  problem.window_right = setup.mask.right;
  problem.flags = setup.spec.deterministic ? FLASHTILE_DETERMINISTIC : 0;
  flashtile_forward_params forward;
  flashtile_forward_init(&forward);
  forward.problem = &problem;
  forward.q = t.q, forward.k = t.k, forward.v = t.v, forward.out = t.out;
  forward.softmax_lse = t.lse;
  forward.lse_stride_batch = queries.heads * queries.seq;
  forward.lse_stride_head = queries.seq;
  flashtile_backward_params backward;
  flashtile_backward_init(&backward);
  backward.problem = &problem;
  backward.q = t.q, backward.k = t.k, backward.v = t.v, backward.out = t.out;
  backward.dout = t.dout, backward.dq = t.dq, backward.dk = t.dk, backward.dv = t.dv;
  backward.softmax_lse = t.lse;
  backward.lse_stride_batch = forward.lse_stride_batch;
  backward.lse_stride_head = forward.lse_stride_head;
  CHECK_EQ(flashtile_workspace_size(&forward, &forward.workspace_bytes), FLASHTILE_OK);
  CHECK_EQ(flashtile_workspace_size_backward(&backward, &backward.workspace_bytes), FLASHTILE_OK);
  void* const workspace =
      backend.allocate(std::max({forward.workspace_bytes, backward.workspace_bytes, size_t{1}}));
  forward.workspace = backward.workspace = workspace;
  CHECK_MESSAGE(flashtile_forward(&forward, nullptr) == FLASHTILE_OK, flashtile_last_error());
  CHECK_MESSAGE(flashtile_backward(&backward, nullptr) == FLASHTILE_OK, flashtile_last_error());
  backend.release(workspace);
}

// What the rows of a tensor are.
enum class Rows { kQueries, kKeys, kLse };

// Places q, k, v, dout and the results, `make(tensor, rows)` each, runs `batch` sequences, and
// compares with fp64 what fetch() of the results gives: those of the setup.
template <class Make>
void check_placed(const Setup& setup, int64_t batch, const Make& make) {
  const Extents& e = setup.extents_q;
  const HostTensor dense_lse(Dtype::kFloat32, {e.batch, e.seq, e.heads, 1},
                             Strides{e.heads * e.seq, 1, e.seq}, 0);
  const auto q = make(setup.q, Rows::kQueries), out = make(setup.dout, Rows::kQueries),
             dout = make(setup.dout, Rows::kQueries), dq = make(setup.q, Rows::kQueries),
             k = make(setup.k, Rows::kKeys), v = make(setup.v, Rows::kKeys),
             dk = make(setup.k, Rows::kKeys), dv = make(setup.v, Rows::kKeys),
             lse = make(dense_lse, Rows::kLse);
  run_large(setup, batch,
            {.q = q.view(),
             .k = k.view(),
             .v = v.view(),
             .out = out.view(),
             .dout = dout.view(),
             .dq = dq.view(),
             .dk = dk.view(),
             .dv = dv.view(),
             .lse = static_cast<float*>(lse.view().data)});
  AttentionOutput result;
  result.out = out.fetch();
  result.lse = lse.fetch();
  result.dq = dq.fetch();
  result.dk = dk.fetch();
  result.dv = dv.fetch();
  const Verdict verdict = compare(setup, Truth(setup), result);
  CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
}

}  // namespace flashtile::test
