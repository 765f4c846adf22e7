// Argument checks. One sentence per refusal: the argument, what it was, what is allowed.
#include "api/check_parts.h"

namespace flashtile {

Status check_cu_seqlens(const char* name, const int32_t* cu, int64_t batch, int64_t total) {
  if (cu[0] != 0) return fail(FLASHTILE_INVALID_ARGUMENT, "%s[0] is %d; allowed: 0", name, cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b]) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s[%lld] is %d; allowed: at least %d, the value before it", name,
                  static_cast<I64>(b) + 1, cu[b + 1], cu[b]);
    }
  }
  if (cu[batch] > total) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s[%lld] is %d; allowed: up to %lld, the number of rows", name,
                static_cast<I64>(batch), cu[batch], static_cast<I64>(total));
  }
  return FLASHTILE_OK;
}

namespace {

// The same for the rows in use: `cu` or, when it is null, `seqlen` says how many there are.
Status check_seqused(const char* name, const int32_t* used, const int32_t* cu, int64_t seqlen,
                     int64_t batch) {
  if (used == nullptr) return FLASHTILE_OK;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu == nullptr ? seqlen : cu[b + 1] - cu[b];
    if (used[b] < 0 || used[b] > length) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s[%lld] is %d; allowed: 0 to %lld, the rows of the sequence", name,
                  static_cast<I64>(b), used[b], static_cast<I64>(length));
    }
  }
  return FLASHTILE_OK;
}

}  // namespace

Status check_offsets(const Target& target, const Problem& p) {
  if (target.device != FLASHTILE_CPU) return FLASHTILE_OK;
  if (p.is_varlen()) {
    if (Status s = check_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q)) return s;
    if (!p.cache.exists()) {
      if (Status s = check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k)) return s;
    }
  }
  if (Status s = check_seqused("seqused_q", p.seqused_q, p.cu_seqlens_q, p.seqlen_q, p.batch))
    return s;
  if (p.cache.exists()) return FLASHTILE_OK;  // cache.h makes its values safe, as on CUDA
  return check_seqused("seqused_k", p.seqused_k, p.cu_seqlens_k, p.seqlen_k, p.batch);
}

Status check_tensor(const TensorArgument& argument, const Problem& problem) {
  const bool empty = argument.rows_per_batch == 0 || argument.batch == 0 || problem.batch == 0;
  if (!empty && argument.tensor.data == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.data is NULL; allowed: a pointer to %lld rows",
                argument.name, static_cast<I64>(argument.rows_per_batch));
  }
  return FLASHTILE_OK;
}

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

Status check_problem(const flashtile_forward_params* user, Target& target, ForwardParams& params) {
  flashtile_forward_params p = {};
  if (Status s = read_struct(user, p, "params")) return s;
  return convert_problem(p.problem, target, params.problem);
}

Status check_problem(const flashtile_backward_params* user, Target& target,
                     BackwardParams& params) {
  flashtile_backward_params p = {};
  if (Status s = read_struct(user, p, "params")) return s;
  if (Status s = convert_problem(p.problem, target, params.problem)) return s;
  if (!params.problem.cache.exists()) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "page_size is %lld in a backward; allowed: 0, a key/value cache has no gradient",
              static_cast<I64>(params.problem.cache.page_size));
}

namespace {

struct ForwardArguments {
  TensorArgument tensors[4];
  RowArgument rows[1];
};
ForwardArguments arguments_of(const flashtile_forward_params& p, const Problem& problem) {
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  const int64_t batch_k = problem.cache.exists() ? problem.cache.num_pages : batch;
  const int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
  return {{{"q", p.q, q, problem.num_heads, batch, dim, false},
           {"k", p.k, k, problem.num_heads_kv, batch_k, dim, false},
           {"v", p.v, k, problem.num_heads_kv, batch_k, dim_v, false},
           {"out", p.out, q, problem.num_heads, batch, dim_v, true}},
          {{"softmax_lse", "lse", p.softmax_lse, p.lse_stride_batch, p.lse_stride_head, true}}};
}

struct BackwardArguments {
  TensorArgument tensors[8];
  RowArgument rows[2];
};
BackwardArguments arguments_of(const flashtile_backward_params& p, const Problem& problem) {
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const int64_t heads = problem.num_heads, heads_kv = problem.num_heads_kv;
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  const int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
  return {
      {{"q", p.q, q, heads, batch, dim, false},
       {"k", p.k, k, heads_kv, batch, dim, false},
       {"v", p.v, k, heads_kv, batch, dim_v, false},
       {"out", p.out, q, heads, batch, dim_v, false},
       {"dout", p.dout, q, heads, batch, dim_v, false},
       {"dq", p.dq, q, heads, batch, dim, true},
       {"dk", p.dk, k, heads_kv, batch, dim, true},
       {"dv", p.dv, k, heads_kv, batch, dim_v, true}},
      {{"softmax_lse", "lse", p.softmax_lse, p.lse_stride_batch, p.lse_stride_head, false},
       {"dsoftmax_lse", "dlse", p.dsoftmax_lse, p.dlse_stride_batch, p.dlse_stride_head, false}}};
}

}  // namespace

Status check_memory(const flashtile_forward_params& user, const Problem& problem) {
  const ForwardArguments arguments = arguments_of(user, problem);
  return check_memory(arguments.tensors, arguments.rows, problem);
}
Status check_memory(const flashtile_backward_params& user, const Problem& problem) {
  const BackwardArguments arguments = arguments_of(user, problem);
  return check_memory(arguments.tensors, arguments.rows, problem);
}

Status check_forward(const flashtile_forward_params* user, Target& target, ForwardParams& params) {
  if (Status s = check_problem(user, target, params)) return s;
  const flashtile_forward_params& p = *user;
  const Problem& problem = params.problem;
  if (Status s = check_tensors(arguments_of(p, problem).tensors, problem)) return s;
  if (Status s = check_offsets(target, problem)) return s;
  params.q = view(p.q);
  params.k = view(p.k);
  params.v = view(p.v);
  params.out = view(p.out);
  params.lse = {p.softmax_lse, p.lse_stride_batch, p.lse_stride_head};
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  return FLASHTILE_OK;
}

Status check_backward(const flashtile_backward_params* user, Target& target,
                      BackwardParams& params) {
  if (Status s = check_problem(user, target, params)) return s;
  const flashtile_backward_params& p = *user;
  const Problem& problem = params.problem;
  if (Status s = check_tensors(arguments_of(p, problem).tensors, problem)) return s;
  if (p.softmax_lse == nullptr && problem.rows_q() > 0 && problem.batch > 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "softmax_lse is NULL; allowed: the softmax_lse of the forward call");
  }
  if (Status s = check_offsets(target, problem)) return s;
  params.q = view(p.q);
  params.k = view(p.k);
  params.v = view(p.v);
  params.out = view(p.out);
  params.dout = view(p.dout);
  params.dq = view(p.dq);
  params.dk = view(p.dk);
  params.dv = view(p.dv);
  params.lse = {const_cast<float*>(p.softmax_lse), p.lse_stride_batch, p.lse_stride_head};
  params.dlse = {const_cast<float*>(p.dsoftmax_lse), p.dlse_stride_batch, p.dlse_stride_head};
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  return FLASHTILE_OK;
}

Status check_stream(const Target& target, CUstream_st* stream) {
  if (target.device != FLASHTILE_CPU || stream == nullptr) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "stream is %p; allowed: NULL on the CPU",
              static_cast<void*>(stream));
}

Status check_workspace(const void* workspace, size_t bytes, const WorkspaceSize& size) {
  const size_t needed = size.least;
  if (bytes < needed && needed == size.wanted) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; allowed: %zu (flashtile_workspace_size) and more", bytes,
                needed);
  }
  if (bytes < needed) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; allowed: %zu, enough for one thread, and more; "
                "flashtile_workspace_size: %zu",
                bytes, needed, size.wanted);
  }
  if (needed > 0 && workspace == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is NULL; allowed: a pointer to %zu bytes",
                size.wanted);
  }
  if (needed > 0 && reinterpret_cast<uintptr_t>(workspace) % 64 != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is %p; allowed: a multiple of 64",
                workspace);
  }
  return FLASHTILE_OK;
}

}  // namespace flashtile
