// The torch ops flashtile::{forward, forward_out, backward, can_run, build_info}, and those of
// kvcache.cpp, on the libtorch stable ABI: one library serves every torch from 2.11 on, with or
// without CUDA. Each op checks its tensors, fills the structs of the C API, lets the core check and
// plan them once, allocates outputs and workspace through torch, and runs.
//
// Dense and varlen are one op: cu_seqlens make the difference. New outputs are contiguous, and the
// core writes every row of them, also those that belong to no sequence.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "boxed.h"
#include "call.h"
#include "forward.h"
#include "kvcache.h"
#include "options.h"
#include "sentences.h"

namespace flashtile::ops {
namespace {

struct Question {
  Arguments args;
  bool backward;
};

// From here on one function per schema, which reads its arguments in their order. All schemas end
// with what Arguments::visit lists.

Arguments read_inputs(Reader& reader) {
  return {.q = reader.next<Tensor>(), .k = reader.next<Tensor>(), .v = reader.next<Tensor>()};
}

template <bool kHasOut>
Arguments read_forward(Reader& reader) {
  Arguments args = read_inputs(reader);
  if (kHasOut) args.out = reader.next<Tensor>();
  reader.read(args);
  return args;
}

BackwardArguments read_backward(Reader& reader) {
  Tensor dout = reader.next<Tensor>();
  Arguments forward = read_inputs(reader);
  BackwardArguments args = {.forward = std::move(forward),
                            .dout = std::move(dout),
                            .out = reader.next<Tensor>(),
                            .softmax_lse = reader.next<Tensor>(),
                            .dsoftmax_lse = reader.next<OptionalTensor>()};
  reader.read(args.forward);
  return args;
}

Question read_question(Reader& reader) {
  Question question = {.args = read_inputs(reader), .backward = reader.next<bool>()};
  question.args.out = reader.next<OptionalTensor>();
  reader.read(question.args);
  return question;
}

ForwardCall to_call(const Arguments& args, const flashtile_problem& problem) {
  return {args.q, args.k, args.v, args.out, problem, args.names()};
}

std::tuple<Tensor, Tensor> forward(const Arguments& args) {
  raise_unless_empty(refusal(args));
  const DeviceScope device(args.q);
  const flashtile_problem problem = to_problem(args);
  return run(to_call(args, problem), device.stream());
}

Tensor forward_out(const Arguments& args) { return std::get<1>(forward(args)); }

// The gradients are stand-ins here.
flashtile_backward_params to_params(const Arguments& forward, const flashtile_problem& problem) {
  flashtile_backward_params params;
  flashtile_backward_init(&params);
  params.problem = &problem;
  params.q = read_view(forward.q);
  params.k = read_view(forward.k);
  params.v = read_view(forward.v);
  params.dq = contiguous_view(forward.q.sizes(), 0);
  params.dk = contiguous_view(forward.k.sizes(), 1);
  params.dv = contiguous_view(forward.v.sizes(), 2);
  return params;
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& args) {
  raise_unless_empty(refusal(args));
  const Arguments& forward = args.forward;
  const DeviceScope device(forward.q);
  const flashtile_problem problem = to_problem(forward);
  flashtile_backward_params params = to_params(forward, problem);
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
  OptionalTensor dq, dk, dv;
  const auto gradient = [](const Tensor& of, OptionalTensor& tensor) {
    tensor = torch::stable::new_empty(of, of.sizes());
    return to_core(write_view(*tensor));
  };
  const auto allocate = [&](BackwardParams& core) {
    core.dq = gradient(forward.q, dq);
    core.dk = gradient(forward.k, dk);
    core.dv = gradient(forward.v, dv);
  };
  run_call<BackwardParams>(params, forward.q, device.stream(), forward.names(), allocate);
  return {*dq, *dk, *dv};
}

Answer answer_backward(const Arguments& args, const flashtile_problem& problem) {
  flashtile_backward_params params = to_params(args, problem);
  double lse = 0.0;
  const std::vector<int64_t> sizes = out_sizes(args.q, args.v);
  params.out = args.out.has_value() ? read_view(*args.out) : contiguous_view(sizes, 3);
  params.dout = contiguous_view(sizes, 4);
  params.softmax_lse = reinterpret_cast<const float*>(&lse);
  return ask_call<BackwardParams>(params, args.names());
}

// No data is read.
Answer can_run(const Question& question) {
  const Arguments& args = question.args;
  const std::string text = refusal(args);
  if (!text.empty()) return {false, "", text};
  const DeviceScope device(args.q);
  const flashtile_problem problem = to_problem(args);
  return question.backward ? answer_backward(args, problem) : answer(to_call(args, problem));
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

// forward.h: the one forward, of tensors and of a cache.
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

STABLE_TORCH_LIBRARY(flashtile, m) {
  define_kvcache_ops(m);
  const auto def = [&](const char* name, const char* tensors, const char* returns) {
    const std::string rest = schema_of<Arguments>();
    m.def(sentence(name, "(", tensors, ", ", rest, ") -> ", returns).c_str());
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

namespace {

void implement_ops(torch::stable::detail::StableLibrary& library) {
  implement_kvcache_ops(library);
  library.impl("forward", boxed<read_forward<false>, forward>);
  library.impl("forward_out", boxed<read_forward<true>, forward_out>);
  library.impl("backward", boxed<read_backward, backward>);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashtile, CPU, m) { implement_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(flashtile, CUDA, m) { implement_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(flashtile, CompositeExplicitAutograd, m) {
  m.impl("can_run", boxed<read_question, can_run>);
  m.impl("build_info", TORCH_BOX(&build_info));
  implement_kvcache_questions(m);
}

}  // namespace flashtile::ops
