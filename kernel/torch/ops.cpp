// The torch ops flashtile::{forward, forward_out, backward, can_run, build_info}, and those of
// kvcache.cpp, on the libtorch stable ABI: one library serves every torch from 2.11 on, with or
// without CUDA. Each op checks its tensors, allocates outputs and workspace through torch, fills
// the C structs and calls the C API.
//
// Dense and varlen are one op: cu_seqlens make the difference. New outputs are contiguous, and the
// core writes every row of them, also those that belong to no sequence.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "call.h"
#include "kvcache.h"
#include "sentences.h"

namespace flashtile::ops {
namespace {

std::vector<int64_t> out_sizes(const Arguments& args) {
  std::vector<int64_t> sizes(args.q.sizes().begin(), args.q.sizes().end());
  sizes.back() = args.v.size(args.v.dim() - 1);
  return sizes;
}

std::vector<int64_t> lse_sizes(const Arguments& args) {
  const Tensor& q = args.q;
  if (args.is_varlen()) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

int64_t lse_stride_batch(const Tensor& lse) { return lse.dim() == 3 ? lse.stride(0) : 0; }
int64_t lse_stride_head(const Tensor& lse) { return lse.stride(lse.dim() - 2); }

flashtile_forward_params forward_params(const Arguments& args, const flashtile_problem& problem) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.q = read_view(args.q);
  params.k = read_view(args.k);
  params.v = read_view(args.v);
  return params;
}

std::tuple<Tensor, Tensor> run_forward(const Arguments& args) {
  raise_unless_empty(refusal(args));
  const DeviceScope device(args.q);
  const flashtile_problem problem = to_problem(args);
  flashtile_forward_params params = forward_params(args, problem);

  size_t bytes = 0;
  raise_unless_ok(flashtile_workspace_size(&params, &bytes), args.names());
  const Tensor out =
      args.out.has_value() ? *args.out : torch::stable::new_empty(args.q, out_sizes(args));
  const Tensor lse =
      torch::stable::new_empty(args.q, lse_sizes(args), lse_dtype(args.q.scalar_type()));
  const Workspace workspace(args.q, bytes);
  params.out = write_view(out);
  params.softmax_lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride_batch = lse_stride_batch(lse);
  params.lse_stride_head = lse_stride_head(lse);
  params.workspace = workspace.data;
  params.workspace_bytes = workspace.size;
  raise_unless_ok(flashtile_forward(&params, device.stream()), args.names());
  return {out, lse};
}

flashtile_backward_params backward_params(const BackwardArguments& args,
                                          const flashtile_problem& problem) {
  flashtile_backward_params params;
  flashtile_backward_init(&params);
  params.problem = &problem;
  params.q = read_view(args.forward.q);
  params.k = read_view(args.forward.k);
  params.v = read_view(args.forward.v);
  params.out = read_view(args.out);
  params.dout = read_view(args.dout);
  params.softmax_lse = static_cast<const float*>(args.softmax_lse.const_data_ptr());
  params.lse_stride_batch = lse_stride_batch(args.softmax_lse);
  params.lse_stride_head = lse_stride_head(args.softmax_lse);
  if (args.dsoftmax_lse.has_value()) {
    const Tensor& dlse = *args.dsoftmax_lse;
    params.dsoftmax_lse = static_cast<const float*>(dlse.const_data_ptr());
    params.dlse_stride_batch = lse_stride_batch(dlse);
    params.dlse_stride_head = lse_stride_head(dlse);
  }
  return params;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const BackwardArguments& args) {
  raise_unless_empty(refusal(args));
  const Arguments& forward = args.forward;
  const DeviceScope device(forward.q);
  const flashtile_problem problem = to_problem(forward);
  flashtile_backward_params params = backward_params(args, problem);

  size_t bytes = 0;
  raise_unless_ok(flashtile_workspace_size_backward(&params, &bytes), forward.names());
  auto gradient_of = [&](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes());
  };
  const Tensor dq = gradient_of(forward.q);
  const Tensor dk = gradient_of(forward.k);
  const Tensor dv = gradient_of(forward.v);
  const Workspace workspace(forward.q, bytes);
  params.dq = write_view(dq);
  params.dk = write_view(dk);
  params.dv = write_view(dv);
  params.workspace = workspace.data;
  params.workspace_bytes = workspace.size;
  raise_unless_ok(flashtile_backward(&params, device.stream()), forward.names());
  return {dq, dk, dv};
}

// The answer of the C API. No data is read.
Answer answer(const Arguments& args, bool backward) {
  const std::string text = refusal(args);
  if (!text.empty()) return {false, "", text};
  const DeviceScope device(args.q);
  const flashtile_problem problem = to_problem(args);
  char name[256] = "", why[512] = "";
  double lse = 0.0;
  const std::vector<int64_t> sizes = out_sizes(args);
  const flashtile_tensor out =
      args.out.has_value() ? write_view(*args.out) : contiguous_view(sizes, 0);
  flashtile_status status = FLASHTILE_OK;
  if (backward) {
    flashtile_backward_params params;
    flashtile_backward_init(&params);
    params.problem = &problem;
    params.q = read_view(args.q);
    params.k = read_view(args.k);
    params.v = read_view(args.v);
    params.out = out;
    params.dout = contiguous_view(sizes, 1);
    params.dq = contiguous_view(args.q.sizes(), 2);
    params.dk = contiguous_view(args.k.sizes(), 3);
    params.dv = contiguous_view(args.v.sizes(), 4);
    params.softmax_lse = reinterpret_cast<const float*>(&lse);
    status = flashtile_can_run_backward(&params, why, sizeof(why));
    if (status == FLASHTILE_OK) status = flashtile_plan_backward(&params, name, sizeof(name));
  } else {
    flashtile_forward_params params = forward_params(args, problem);
    params.out = out;
    status = flashtile_can_run(&params, why, sizeof(why));
    if (status == FLASHTILE_OK) status = flashtile_plan(&params, name, sizeof(name));
  }
  return {status == FLASHTILE_OK, name, in_words_of_op(why, args.names())};
}

// From here on one function per op. Their parameters are the op's schema, one to one; the members
// of Arguments have the same order.

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<double> softmax_scale, int64_t window_left,
                                   int64_t window_right, bool deterministic, int64_t alignment,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k,
                                   const std::optional<Tensor>& cu_seqlens_q,
                                   const std::optional<Tensor>& cu_seqlens_k,
                                   const std::optional<Tensor>& seqused_q,
                                   const std::optional<Tensor>& seqused_k) {
  return run_forward({q, k, v, softmax_scale, window_left, window_right, deterministic, alignment,
                      max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q,
                      seqused_k});
}

Tensor forward_out(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
                   bool deterministic, int64_t alignment, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_k,
                   const std::optional<Tensor>& seqused_q, const std::optional<Tensor>& seqused_k) {
  return std::get<1>(run_forward({q, k, v, softmax_scale, window_left, window_right, deterministic,
                                  alignment, max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k,
                                  seqused_q, seqused_k, out}));
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& softmax_lse, const std::optional<Tensor>& dsoftmax_lse,
    std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
    bool deterministic, int64_t alignment, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_q, const std::optional<Tensor>& seqused_k) {
  return run_backward(
      {.forward = {q, k, v, softmax_scale, window_left, window_right, deterministic, alignment,
                   max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k},
       .dout = dout,
       .out = out,
       .softmax_lse = softmax_lse,
       .dsoftmax_lse = dsoftmax_lse});
}

Answer can_run(const Tensor& q, const Tensor& k, const Tensor& v, bool backward,
               const std::optional<Tensor>& out, std::optional<double> softmax_scale,
               int64_t window_left, int64_t window_right, bool deterministic, int64_t alignment,
               int64_t max_seqlen_q, int64_t max_seqlen_k,
               const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
               const std::optional<Tensor>& seqused_q, const std::optional<Tensor>& seqused_k) {
  return answer({q, k, v, softmax_scale, window_left, window_right, deterministic, alignment,
                 max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, out},
                backward);
}

// Lines "name=value"; the lists among the values are comma-separated.
std::string build_info() {
  flashtile_build_info info = {};
  info.struct_size = sizeof(info);
  raise_unless_ok(flashtile_get_build_info(&info), {});
  return std::string("version=") + info.version +
         "\ncuda_architectures=" + info.cuda_architectures +
         "\ncuda_head_dims=" + info.cuda_head_dims +
         "\ncpu_instruction_sets=" + info.cpu_instruction_sets +
         "\ncpu_instruction_set_used=" + info.cpu_instruction_set_used +
         "\ntorch_headers=" FLASHTILE_TORCH_HEADERS;
}

}  // namespace

STABLE_TORCH_LIBRARY(flashtile, m) {
  define_kvcache_ops(m);
  // How to attend, the same at the end of every op. Tensors among them are positional because torch
  // registers neither gradients nor vmap rules for ops with keyword-only tensors.
  const std::string options =
      "float? softmax_scale, SymInt window_left, SymInt window_right, bool deterministic=False, "
      "int alignment=0, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None)";
  const auto def = [&](const char* name, const char* tensors, const char* returns) {
    m.def((std::string(name) + "(" + tensors + ", " + options + " -> " + returns).c_str());
  };
  def("forward", "Tensor q, Tensor k, Tensor v", "(Tensor out, Tensor softmax_lse)");
  def("forward_out", "Tensor q, Tensor k, Tensor v, Tensor(a!) out", "Tensor softmax_lse");
  def("backward",
      "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor? dsoftmax_lse",
      "(Tensor dq, Tensor dk, Tensor dv)");
  def("can_run", "Tensor q, Tensor k, Tensor v, bool backward, Tensor? out",
      "(bool ok, str kernel, str why)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flashtile, CPU, m) {
  implement_kvcache_ops(m);
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_out", TORCH_BOX(&forward_out));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(flashtile, CUDA, m) {
  implement_kvcache_ops(m);
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_out", TORCH_BOX(&forward_out));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(flashtile, CompositeExplicitAutograd, m) {
  m.impl("can_run", TORCH_BOX(&can_run));
  m.impl("build_info", TORCH_BOX(&build_info));
  implement_kvcache_questions(m);
}

}  // namespace flashtile::ops
