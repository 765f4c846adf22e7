// The torch ops flashtile::{forward, forward_out, forward_max_logit, forward_max_logit_out,
// backward, backward_scores, can_run, build_info}, and those of kvcache.cpp, on the libtorch stable
// ABI: one library serves every torch from 2.11 on, with or without CUDA. Each op checks its
// tensors, fills the structs of the C API, lets the core check and plan them once, allocates
// outputs and workspace through torch, and runs.
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
  bool max_logit = false;  // of the forward
  WantedGradients wanted = {};

  template <class Visit>
  void visit(const Visit& member) {
    args.visit(member);
    member("bool max_logit=False", max_logit);
    wanted.visit(member);
  }
};

// From here on one function per schema, which reads its arguments in their order. All schemas end
// with what Arguments::visit lists, and those that ask more with what is theirs alone.

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

template <bool kHasWanted>
BackwardArguments read_backward(Reader& reader) {
  Tensor dout = reader.next<Tensor>();
  Arguments forward = read_inputs(reader);
  BackwardArguments args = {.forward = std::move(forward),
                            .dout = std::move(dout),
                            .out = reader.next<Tensor>(),
                            .softmax_lse = reader.next<Tensor>(),
                            .dsoftmax_lse = reader.next<OptionalTensor>()};
  reader.read(args.forward);
  if (kHasWanted) reader.read(args.wanted);
  return args;
}

Question read_question(Reader& reader) {
  Question question = {.args = read_inputs(reader), .backward = reader.next<bool>()};
  question.args.out = reader.next<OptionalTensor>();
  reader.read(question);
  return question;
}

ForwardResult run_forward(const Arguments& args, bool max_logit) {
  raise_unless_empty(refusal(args));
  const DeviceScope device(args.q);
  flashtile_scores scores;
  const flashtile_problem problem = to_problem(args, scores);
  return run(args, problem, max_logit, device.stream());
}

std::tuple<Tensor, Tensor> forward(const Arguments& args) {
  ForwardResult result = run_forward(args, /*max_logit=*/false);
  return {std::move(result.out), std::move(result.softmax_lse)};
}

Tensor forward_out(const Arguments& args) {
  return run_forward(args, /*max_logit=*/false).softmax_lse;
}

std::tuple<Tensor, Tensor, Tensor> forward_max_logit(const Arguments& args) {
  ForwardResult result = run_forward(args, /*max_logit=*/true);
  return {std::move(result.out), std::move(result.softmax_lse), std::move(*result.max_logit)};
}

std::tuple<Tensor, Tensor> forward_max_logit_out(const Arguments& args) {
  ForwardResult result = run_forward(args, /*max_logit=*/true);
  return {std::move(result.softmax_lse), std::move(*result.max_logit)};
}

// The gradients are stand-ins here.
flashtile_backward_params to_params(const Arguments& forward, const flashtile_problem& problem,
                                    const WantedGradients& wanted) {
  flashtile_backward_params params;
  flashtile_backward_init(&params);
  params.problem = &problem;
  params.q = read_view(forward.q);
  params.k = read_view(forward.k);
  params.v = read_view(forward.v);
  params.dq = contiguous_view(forward.q.sizes(), 0);
  params.dk = contiguous_view(forward.k.sizes(), 1);
  params.dv = contiguous_view(forward.v.sizes(), 2);
  set_stand_ins(forward.scores, wanted, 3, params);
  return params;
}

// The gradients of q, k, v and of scores.
struct AllGradients {
  OptionalTensor dq, dk, dv;
  ScoreGradients of_scores;
};

// Of arguments that were not refused.
AllGradients run_backward(const BackwardArguments& args) {
  const Arguments& forward = args.forward;
  const DeviceScope device(forward.q);
  flashtile_scores scores;
  const flashtile_problem problem = to_problem(forward, scores);
  flashtile_backward_params params = to_params(forward, problem, args.wanted);
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
  AllGradients results;
  const auto gradient = [](const Tensor& of, OptionalTensor& tensor) {
    tensor = torch::stable::new_empty(of, of.sizes());
    return to_core(write_view(*tensor));
  };
  const auto allocate = [&](Call<BackwardParams>& call) {
    call.params.dq = gradient(forward.q, results.dq);
    call.params.dk = gradient(forward.k, results.dk);
    call.params.dv = gradient(forward.v, results.dv);
    if (!args.wanted.any()) return;
    results.of_scores = new_gradients(forward.scores, args.wanted, forward.q);
    place(results.of_scores, call.scores);
  };
  run_call<BackwardParams>(params, forward.q, device.stream(), forward.names(), allocate);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& args) {
  raise_unless_empty(refusal(args));
  const AllGradients results = run_backward(args);
  return {*results.dq, *results.dk, *results.dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_scores(
    BackwardArguments args) {
  raise_unless_empty(refusal(args));
  args.forward.scores = separated(args.forward.scores, args.wanted);
  const auto [dq, dk, dv, of_scores] = run_backward(args);
  const auto& [dalibi_slopes, dbias, dbias2, dsink] = of_scores;
  return {*dq, *dk, *dv, dalibi_slopes, dbias, dbias2, dsink};
}

Answer answer_backward(const Question& question, const flashtile_problem& problem) {
  const Arguments& args = question.args;
  flashtile_backward_params params = to_params(args, problem, question.wanted);
  double lse = 0.0;
  const std::vector<int64_t> sizes = out_sizes(args.q, args.v);
  params.out = args.out.has_value() ? read_view(*args.out) : contiguous_view(sizes, 7);
  params.dout = contiguous_view(sizes, 8);
  params.softmax_lse = reinterpret_cast<const float*>(&lse);
  return ask_call<BackwardParams>(params, args.names());
}

// No data is read.
Answer can_run(const Question& question) {
  const Arguments& args = question.args;
  std::string text = refusal(args);
  if (text.empty()) text = refusal(question.wanted, args.scores);
  if (!text.empty()) return {false, "", text};
  const DeviceScope device(args.q);
  flashtile_scores scores;
  const flashtile_problem problem = to_problem(args, scores);
  if (!question.backward) return answer(args, problem, question.max_logit);
  set_copies(args.scores, question.wanted, scores);
  return answer_backward(question, problem);
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
  const auto def = [&](const char* name, const char* tensors, const std::string& rest,
                       const char* returns) {
    m.def(sentence(name, "(", tensors, ", ", rest, ") -> ", returns).c_str());
  };
  const std::string rest = schema_of<Arguments>();
  def("forward", "Tensor q, Tensor k, Tensor v", rest, "(Tensor out, Tensor softmax_lse)");
  def("forward_out", "Tensor q, Tensor k, Tensor v, Tensor(a!) out", rest, "Tensor softmax_lse");
  def("forward_max_logit", "Tensor q, Tensor k, Tensor v", rest,
      "(Tensor out, Tensor softmax_lse, Tensor max_logit)");
  def("forward_max_logit_out", "Tensor q, Tensor k, Tensor v, Tensor(a!) out", rest,
      "(Tensor softmax_lse, Tensor max_logit)");
  const char* const saved =
      "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor? dsoftmax_lse";
  def("backward", saved, rest, "(Tensor dq, Tensor dk, Tensor dv)");
  def("backward_scores", saved, rest + ", " + schema_of<WantedGradients>(),
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dalibi_slopes, Tensor dbias, Tensor dbias2, "
      "Tensor dsink)");
  def("can_run", "Tensor q, Tensor k, Tensor v, bool backward, Tensor? out", schema_of<Question>(),
      "(bool ok, str kernel, str why)");
  m.def("build_info() -> str");
}

namespace {

void implement_ops(torch::stable::detail::StableLibrary& library) {
  implement_kvcache_ops(library);
  library.impl("forward", boxed<read_forward<false>, forward>);
  library.impl("forward_out", boxed<read_forward<true>, forward_out>);
  library.impl("forward_max_logit", boxed<read_forward<false>, forward_max_logit>);
  library.impl("forward_max_logit_out", boxed<read_forward<true>, forward_max_logit_out>);
  library.impl("backward", boxed<read_backward<false>, backward>);
  library.impl("backward_scores", boxed<read_backward<true>, backward_scores>);
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
