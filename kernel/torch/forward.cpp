#include "forward.h"

#include "arguments.h"

namespace flashtile::ops {
namespace {

// A new out is a stand-in here.
flashtile_forward_params to_params(const ForwardCall& call) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &call.problem;
  params.q = read_view(call.q);
  params.k = read_view(call.k);
  params.v = read_view(call.v);
  params.out =
      call.out.has_value() ? write_view(*call.out) : contiguous_view(out_sizes(call.q, call.v), 0);
  return params;
}

}  // namespace

std::tuple<Tensor, Tensor> run(const ForwardCall& call, CUstream_st* stream) {
  OptionalTensor out = call.out, lse;
  const auto allocate = [&](ForwardParams& params) {
    if (!out.has_value()) {
      out = torch::stable::new_empty(call.q, out_sizes(call.q, call.v));
      params.out = to_core(write_view(*out));
    }
    lse = torch::stable::new_empty(call.q, lse_sizes(call.q), lse_dtype(call.q.scalar_type()));
    params.lse = {static_cast<float*>(lse->mutable_data_ptr()), lse_stride_batch(*lse),
                  lse_stride_head(*lse)};
  };
  run_call<ForwardParams>(to_params(call), call.q, stream, call.names, allocate);
  return {*out, *lse};
}

Answer answer(const ForwardCall& call) {
  return ask_call<ForwardParams>(to_params(call), call.names);
}

}  // namespace flashtile::ops
