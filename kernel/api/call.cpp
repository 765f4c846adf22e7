// From the caller's struct to a planned call, and on to the backend that holds the memory.
#include "api/call.h"

#include "api/check_scores.h"

namespace flashtile {
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
  const Dtype dtype = problem.dtype, dtype_kv = problem.dtype_kv();
  return {{{"q", p.q, q, problem.num_heads, batch, dim, false, dtype},
           {"k", p.k, k, problem.num_heads_kv, batch_k, dim, false, dtype_kv},
           {"v", p.v, k, problem.num_heads_kv, batch_k, dim_v, false, dtype_kv},
           {"out", p.out, q, problem.num_heads, batch, dim_v, true, dtype}},
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
  const Dtype dtype = problem.dtype;
  return {
      {{"q", p.q, q, heads, batch, dim, false, dtype},
       {"k", p.k, k, heads_kv, batch, dim, false, dtype},
       {"v", p.v, k, heads_kv, batch, dim_v, false, dtype},
       {"out", p.out, q, heads, batch, dim_v, false, dtype},
       {"dout", p.dout, q, heads, batch, dim_v, false, dtype},
       {"dq", p.dq, q, heads, batch, dim, true, dtype},
       {"dk", p.dk, k, heads_kv, batch, dim, true, dtype},
       {"dv", p.dv, k, heads_kv, batch, dim_v, true, dtype}},
      {{"softmax_lse", "lse", p.softmax_lse, p.lse_stride_batch, p.lse_stride_head, false},
       {"dsoftmax_lse", "dlse", p.dsoftmax_lse, p.dlse_stride_batch, p.dlse_stride_head, false}}};
}

// What the two passes do not share: the views, and what only one of them refuses.
Status convert(const flashtile_forward_params& p, ForwardParams& params) {
  params.q = view(p.q);
  params.k = view(p.k);
  params.v = view(p.v);
  params.out = view(p.out);
  params.lse = {p.softmax_lse, p.lse_stride_batch, p.lse_stride_head};
  return FLASHTILE_OK;
}
Status convert(const flashtile_backward_params& p, BackwardParams& params) {
  const Problem& problem = params.problem;
  if (p.softmax_lse == nullptr && problem.rows_q() > 0 && problem.batch > 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "softmax_lse is NULL; allowed: the softmax_lse of the forward call");
  }
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
  return FLASHTILE_OK;
}

Status check_pass(const ForwardParams&) { return FLASHTILE_OK; }
Status check_pass(const BackwardParams& params) {
  const Problem& problem = params.problem;
  if (problem.dtype_kv() != problem.dtype) {
    return fail(FLASHTILE_UNSUPPORTED, "dtype_kv is %s in a backward; allowed: %s, the dtype of q",
                dtype_name(problem.dtype_kv()), dtype_name(problem.dtype));
  }
  if (!problem.cache.exists()) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "page_size is %lld in a backward; allowed: 0, a key/value cache has no gradient",
              static_cast<I64>(problem.cache.page_size));
}

// Of the first version of a struct.
constexpr size_t least_size(const flashtile_forward_params*) {
  return offsetof(flashtile_forward_params, max_logit);
}
constexpr size_t least_size(const flashtile_backward_params*) {
  return offsetof(flashtile_backward_params, dbias);
}

template <class UserParams, class Params>
Status convert_sizes(const UserParams* user, UserParams& p, Call<Params>& call) {
  if (Status s = read_struct(user, p, "params", least_size(user))) return s;
  if (Status s = convert_problem(p.problem, call.target, call.params.problem)) return s;
  call.device.set_wanted(call.target.device_index);
  if (Status s = convert_scores(p, call.params.problem, call.scores)) return s;
  return check_pass(call.params);
}

template <class Params>
Status choose(Call<Params>& call) {
  return call.target.device == FLASHTILE_CPU
             ? cpu::choose(call.params, call.scores, call.target.threads, call.plan)
             : cuda::choose(call.params, call.scores, call.device, call.plan);
}

}  // namespace

template <class UserParams, class Params>
Status prepare(const UserParams* user, Call<Params>& call) {
  UserParams p = {};
  if (Status s = convert_sizes(user, p, call)) return s;
  Params& params = call.params;
  const auto arguments = arguments_of(p, params.problem);
  if (Status s = check_tensors(arguments.tensors, params.problem)) return s;
  if (Status s = convert(p, params)) return s;
  if (Status s = check_offsets(call.target, params.problem)) return s;
  if (Status s = check_score_lengths(call.target, params.problem, call.scores)) return s;
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  if (Status s = choose(call)) return s;
  const auto check = [&](std::span<const ScoreArgument> scores) {
    return check_memory(arguments.tensors, arguments.rows, scores, params.problem);
  };
  return call.scores.exist() ? check(score_arguments(params.problem, call.scores).all())
                             : check({});  // a call without scores does not list them
}

template <class UserParams, class Params>
Status prepare_sizes(const UserParams* user, Call<Params>& call) {
  UserParams p = {};
  if (Status s = convert_sizes(user, p, call)) return s;
  return choose(call);
}

template <class Params>
Status run(const Call<Params>& call, CUstream_st* stream) {
  const Params& params = call.params;
  if (Status s = check_workspace(params.workspace, params.workspace_bytes, call.plan.workspace))
    return s;
  if (Status s = check_stream(call.target, stream)) return s;
  return call.target.device == FLASHTILE_CPU ? cpu::run(params, call.scores, call.plan)
                                             : cuda::run(params, call.scores, call.plan, stream);
}

template Status prepare(const flashtile_forward_params*, Call<ForwardParams>&);
template Status prepare(const flashtile_backward_params*, Call<BackwardParams>&);
template Status prepare_sizes(const flashtile_forward_params*, Call<ForwardParams>&);
template Status prepare_sizes(const flashtile_backward_params*, Call<BackwardParams>&);
template Status run(const Call<ForwardParams>&, CUstream_st*);
template Status run(const Call<BackwardParams>&, CUstream_st*);

}  // namespace flashtile
