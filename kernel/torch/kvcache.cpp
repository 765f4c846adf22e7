// A key/value cache for PyTorch. Reading it (forward_kvcache) and writing to it (append_kv) are two
// ops, so that only the one that writes declares it: a compiler copies no cache to read it. Each
// has a struct of arguments, so that can_run_kvcache asks exactly what they ask.
#include "kvcache.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "boxed.h"
#include "cache_checks.h"
#include "call.h"
#include "forward.h"
#include "kvcache_arguments.h"
#include "options.h"

namespace flashtile::ops {
namespace {

// Of an append, where there is one, and the attention after it.
struct Question {
  std::optional<AppendArguments> append;
  ReadArguments read;
};

// From here on one function per schema, which reads its arguments in their order.

ReadArguments read_inputs(Reader& reader) {
  return {.q = reader.next<Tensor>(),
          .cache = {.k_cache = reader.next<Tensor>(), .v_cache = reader.next<Tensor>()}};
}

template <bool kHasOut>
ReadArguments read_forward(Reader& reader) {
  ReadArguments args = read_inputs(reader);
  if (kHasOut) args.out = reader.next<Tensor>();
  reader.read(args);
  return args;
}

template <bool kHasRotation>
AppendArguments read_append(Reader& reader) {
  AppendArguments args = {
      .cache = {.k_cache = reader.next<Tensor>(), .v_cache = reader.next<Tensor>()},
      .k = reader.next<Tensor>(),
      .v = reader.next<Tensor>()};
  if (kHasRotation) {
    args.rotation = Rotation{.q = reader.next<Tensor>(),
                             .cos = reader.next<Tensor>(),
                             .sin = reader.next<Tensor>(),
                             .interleaved = reader.next<bool>(),
                             .q_fixed = reader.next<bool>()};
  }
  reader.read(args);
  return args;
}

// Without the attention's new rows and padding, which an append does not look at.
AppendArguments append_of(const ReadArguments& read, Tensor k, Tensor v) {
  AppendArguments args = {.cache = read.cache,
                          .k = std::move(k),
                          .v = std::move(v),
                          .cu_seqlens_new = read.added.cu_seqlens,
                          .check = read.check};
  args.cache.cache_leftpad.reset();
  return args;
}

Question read_question(Reader& reader) {
  ReadArguments read = read_inputs(reader);
  auto k = reader.next<OptionalTensor>(), v = reader.next<OptionalTensor>();
  auto cos = reader.next<OptionalTensor>(), sin = reader.next<OptionalTensor>();
  read.out = reader.next<OptionalTensor>();
  reader.read(read);
  std::optional<AppendArguments> append;
  if (k.has_value() && v.has_value()) {
    append = append_of(read, std::move(*k), std::move(*v));
    if (cos.has_value() && sin.has_value())
      append->rotation = Rotation{read.q, std::move(*cos), std::move(*sin), true, false};
  }
  return {std::move(append), std::move(read)};
}

std::tuple<Tensor, Tensor> forward_kvcache(const ReadArguments& args) {
  raise_unless_empty(refusal(args));
  flashtile_scores scores;
  const flashtile_problem problem = to_problem(args, scores);
  const DeviceScope device(args.q);
  if (is_checked(args.check)) check_numbers(problem, device.stream());
  auto [out, lse, max_logit] = run(args, problem, /*wants_max_logit=*/false, device.stream());
  return {std::move(out), std::move(lse)};
}

Tensor forward_kvcache_out(const ReadArguments& args) { return std::get<1>(forward_kvcache(args)); }

// Returns q, rotated.
OptionalTensor append(const AppendArguments& args) {
  raise_unless_empty(refusal(args));
  const DeviceScope device(args.like());
  const flashtile_problem problem = to_problem(args);
  flashtile_append_kv_params params = to_params(args, problem);
  if (is_checked(args.check)) check_numbers(problem, device.stream());
  OptionalTensor q_out;
  if (args.rotation.has_value()) {
    q_out = torch::stable::new_empty(args.rotation->q, args.rotation->q.sizes());
    params.q_out = write_view(*q_out);
  }
  raise_unless_ok(flashtile_append_kv(&params, device.stream()), kCacheNames);
  return q_out;
}

void append_kv(const AppendArguments& args) { append(args); }

Tensor append_kv_rotary(const AppendArguments& args) { return append(args).value(); }

// The answers of the C API; no data but numbers on the CPU is read.
std::string append_answer(const AppendArguments& args) {
  std::string text = refusal(args);
  if (!text.empty()) return text;
  const DeviceScope device(args.like());
  const flashtile_problem problem = to_problem(args);
  flashtile_append_kv_params params = to_params(args, problem);
  if (args.rotation.has_value()) params.q_out = contiguous_view(args.rotation->q.sizes(), 0);
  if (problem.device == FLASHTILE_CPU && is_checked(args.check)) text = numbers_refusal(problem);
  char why[512] = "";
  if (text.empty() && flashtile_can_run_append_kv(&params, why, sizeof(why)) != FLASHTILE_OK)
    text = in_words_of_op(why, kCacheNames);
  return text;
}

Answer read_answer(const ReadArguments& args) {
  std::string text = refusal(args);
  if (!text.empty()) return {false, "", text};
  const DeviceScope device(args.q);
  flashtile_scores scores;
  const flashtile_problem problem = to_problem(args, scores);
  if (problem.device == FLASHTILE_CPU && is_checked(args.check)) text = numbers_refusal(problem);
  if (!text.empty()) return {false, "", text};
  return answer(args, problem, /*wants_max_logit=*/false);
}

Answer can_run_kvcache(const Question& question) {
  if (question.append.has_value()) {
    const std::string text = append_answer(*question.append);
    if (!text.empty()) return {false, "", text};
  }
  return read_answer(question.read);
}

// The gradient, a 0-d tensor, of whatever went into attention over a cache: an op, so that
// compilers trace it, and only a backward pass that runs raises.
Tensor gradient_of_kvcache(const Tensor&) {
  throw std::runtime_error(
      "attention_with_kvcache was differentiated; allowed: its result without a gradient "
      "(attention and attention_varlen have one)");
}

}  // namespace

void define_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  const auto def = [&](const char* name, const char* tensors, const std::string& rest,
                       const char* returns) {
    library.def(sentence(name, "(", tensors, ", ", rest, ") -> ", returns).c_str());
  };
  const std::string read = schema_of<ReadArguments>(), append = schema_of<AppendArguments>();
  def("forward_kvcache", "Tensor q, Tensor k_cache, Tensor v_cache", read,
      "(Tensor out, Tensor softmax_lse)");
  def("forward_kvcache_out", "Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out", read,
      "Tensor softmax_lse");
  def("append_kv", "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v", append, "()");
  def("append_kv_rotary",
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor q, Tensor rotary_cos, "
      "Tensor rotary_sin, bool interleaved, bool q_fixed",
      append, "Tensor");
  def("can_run_kvcache",
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor? rotary_cos, "
      "Tensor? rotary_sin, Tensor? out",
      read, "(bool ok, str kernel, str why)");
  library.def("raise_pending_checks() -> ()");
  library.def("gradient_of_kvcache(Tensor dout) -> Tensor");
}

void implement_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("forward_kvcache", boxed<read_forward<false>, forward_kvcache>);
  library.impl("forward_kvcache_out", boxed<read_forward<true>, forward_kvcache_out>);
  library.impl("append_kv", boxed<read_append<false>, append_kv>);
  library.impl("append_kv_rotary", boxed<read_append<true>, append_kv_rotary>);
  library.impl("gradient_of_kvcache", TORCH_BOX(&gradient_of_kvcache));
}

void implement_kvcache_questions(torch::stable::detail::StableLibrary& library) {
  library.impl("can_run_kvcache", boxed<read_question, can_run_kvcache>);
  library.impl("raise_pending_checks", TORCH_BOX(&raise_pending_checks));
}

}  // namespace flashtile::ops
