// flashtile for libtorch: attention on at::Tensor with autograd. Header-only, no Python.
//
//   #include <flashtile/torch.h>
//   auto [out, softmax_lse] = flashtile::attention(q, k, v, {.causal = true, .return_lse = true});
//
// Calls the ops of libflashtile_torch.so through the dispatcher and registers nothing, so it lives
// beside the Python package. Link the CMake target flashtile::torch, which keeps that library.
//
// Contract, as in flashtile.h: softmax_lse is a natural logarithm, fp32, or fp64 for fp64 inputs; a
// row that sees no key has out 0, softmax_lse -inf and gradients 0.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "torch_autograd.h"
#include "torch_kvcache.h"
#include "torch_merge.h"
#include "torch_ops.h"
#include "torch_options.h"

namespace flashtile {

namespace detail {

// What no op can refuse, since it does not see it.
inline void check(TensorRef q, TensorRef k, TensorRef v, const AttentionOptions& options) {
  refuse_tangents({&q, &k, &v});
  for (const at::Tensor& tensor : score_tensors(options)) refuse_tangents({&tensor});
  check_device("k", k, q);
  check_device("v", v, q);
  check_score_devices(q, options);
  check_device("rng_state", options.rng_state, q);
  raise_unless(!options.query_scale.has_value() || !wants_gradient(*options.query_scale),
               "query_scale requires grad; allowed: query_scale.detach(), as it has no gradient (q "
               "has one: scale q instead)");
  if (!options.out.has_value()) return;
  refuse_score_gradients(options);
  refuse_gradients("out is a tensor", "out",
                   {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &*options.out}});
}

inline Call call_of(std::optional<Sequences> sequences, const AttentionOptions& options) {
  Call call = {.options = options, .sequences = std::move(sequences)};
  call.options.out.reset();
  return call;
}

// Whether seed and offset are to be drawn; a dropout_p that is not allowed is the op's to refuse.
inline bool wants_state(const AttentionOptions& options) {
  return options.dropout_p >= 0x1p-32 && options.dropout_p <= 1 && !options.rng_state.has_value();
}

struct Inputs {
  at::Tensor q, k, v;
};

// q, k and v as the op gets them.
inline Inputs checked_inputs(TensorRef q, TensorRef k, TensorRef v,
                             const AttentionOptions& options) {
  check(q, k, v, options);
  Inputs inputs = {autocast(q), autocast(k), autocast(v)};
  Tensors tensors = tensors_with_gradients(options);
  tensors.insert(tensors.end(), {q, k, v});
  if (std::ranges::any_of(tensors, wants_gradient))
    refuse_narrow_gradient(inputs.q, inputs.k, inputs.v);
  return inputs;
}

inline AttentionResult attend(TensorRef q_given, TensorRef k_given, TensorRef v_given,
                              std::optional<Sequences> sequences, const AttentionOptions& options) {
  const auto [q, k, v] = checked_inputs(q_given, k_given, v_given, options);
  Call call = call_of(std::move(sequences), options);
  if (wants_state(options))
    call.options.rng_state = at::randint(0, INT64_MAX, {2}, q.options().dtype(at::kLong));
  AttentionResult result;
  if (options.out.has_value()) {
    result.out = *options.out;
    result.softmax_lse = call_forward_out(q, k, v, result.out, call);
  } else {
    const Tensors of_scores = tensors_with_gradients(call.options);
    const Gradients both = ForwardFunction::apply(q, k, v, call, at::TensorList(of_scores));
    result = {both[0], both[1]};
  }
  if (!options.return_lse) result.softmax_lse.reset();
  return result;
}

inline CanRun ask(TensorRef q_given, TensorRef k_given, TensorRef v_given,
                  std::optional<Sequences> sequences, const AttentionOptions& options,
                  bool backward) {
  static const Op op("flashtile::can_run");
  return answer_of([&](Stack& stack) {
    const auto [q, k, v] = checked_inputs(q_given, k_given, v_given, options);
    raise_unless(!backward || !options.out.has_value(),
                 "out is a tensor and gradients are asked for; allowed: none");
    torch::jit::push(stack, q, k, v, backward, options.out);
    Call call = call_of(std::move(sequences), options);
    if (wants_state(options))  // nothing is drawn
      call.options.rng_state = at::zeros({2}, q.options().dtype(at::kLong));
    call.push(stack);
    torch::jit::push(stack, /*max_logit=*/false);
    for (const std::optional<at::Tensor>& tensor :
         {options.alibi_slopes, options.bias, options.bias2, options.sink})
      stack.emplace_back(backward && tensor.has_value() && tensor->requires_grad());
    op(stack);
  });
}

// Checks values where they lie. Shapes that are wrong are left to the op, which names them.
inline void assert_sequence(int64_t rows, TensorRef cu_seqlens, OptionalRef seqused) {
  if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) == 0) return;
  const int64_t batch = cu_seqlens.size(0) - 1;
  const at::Tensor lengths = cu_seqlens.slice(0, 1) - cu_seqlens.slice(0, 0, batch);
  at::_assert_async(
      cu_seqlens[0].eq(0) & cu_seqlens[batch].le(rows) & lengths.ge(0).all(),
      "flashtile: cu_seqlens does not rise from 0 to the rows that there are; "
      "allowed: 0 first, no value below the one before it, the last at most the rows");
  if (!seqused.has_value() || seqused->sizes() != lengths.sizes()) return;
  at::_assert_async((seqused->ge(0) & seqused->le(lengths)).all(),
                    "flashtile: seqused has a value outside its sequence; "
                    "allowed: 0 to the rows of the sequence");
}

// "80,89" as {"80", "89"}.
inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

}  // namespace detail

// out = softmax(softmax_scale * q k^T + mask) v, per batch and head, in memory linear in the
// length.
//
// q (batch, seqlen_q, num_heads, head_dim); k (batch, seqlen_k, num_heads_kv, head_dim) and v
// (batch, seqlen_k, num_heads_kv, head_dim_v), where num_heads_kv divides num_heads and query head
// h reads key head h / (num_heads / num_heads_kv). fp16, bf16, fp32, fp64 on the CPU, fp16 and bf16
// on CUDA; any strides, 1 in the last dimension; nothing is copied. On the CPU k and v may have 16
// bits, fp16 or bf16, under fp32 q, only where no gradient is wanted. CUDA work goes to the current
// stream and is not waited for.
//
// Differentiable once in q, k, v, alibi_slopes, bias, bias2 and sink, through out and softmax_lse.
// Throws std::runtime_error, whose what() is one sentence that names the argument, its value and
// what is allowed.
inline AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionOptions& options = {}) {
  return detail::attend(q, k, v, std::nullopt, options);
}

// The same over packed sequences: q (total_q, num_heads, head_dim), k (total_k, num_heads_kv,
// head_dim), v (total_k, num_heads_kv, head_dim_v). Sequence b owns the rows cu_seqlens[b] to
// cu_seqlens[b + 1] - 1; its mask is aligned by its own rows in use.
inline AttentionResult attention_varlen(const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& v, const Sequences& sequences,
                                        const AttentionOptions& options = {}) {
  if (sequences.check && q.is_cuda()) {
    detail::assert_sequence(q.size(0), sequences.cu_seqlens_q, sequences.seqused_q);
    detail::assert_sequence(k.size(0), sequences.cu_seqlens_k, sequences.seqused_k);
  }
  return detail::attend(q, k, v, sequences, options);
}

// Whether attention would run or, with `backward`, its gradients: makes the checks and the choice
// of kernel that the call makes, and computes nothing. return_lse changes nothing. The gradients
// are those of q, k and v, and of alibi_slopes, bias, bias2 and sink where these require grad.
inline CanRun can_run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const AttentionOptions& options = {}, bool backward = false) {
  return detail::ask(q, k, v, std::nullopt, options, backward);
}

// The same of attention_varlen. On CUDA no values are looked at; `check` changes nothing.
inline CanRun can_run_varlen(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const Sequences& sequences, const AttentionOptions& options = {},
                             bool backward = false) {
  return detail::ask(q, k, v, sequences, options, backward);
}

// What is in the libflashtile_torch.so that runs.
struct BuildInfo {
  std::string version;
  std::vector<std::string> cuda_architectures;  // "80", "90a"; empty without CUDA
  std::vector<std::string> cuda_head_dims;      // of the CUDA kernels
  std::vector<std::string> cpu_instruction_sets;
  std::string cpu_instruction_set_used;  // on this machine
  std::string torch_headers;             // the torch that it was built against
};

inline BuildInfo build_info() {
  static const detail::Op op("flashtile::build_info");
  detail::Stack stack;
  op(stack);
  BuildInfo info;
  std::istringstream lines(stack[0].toStringRef());
  for (std::string line; std::getline(lines, line);) {
    const size_t equals = line.find('=');
    const std::string name = line.substr(0, equals), value = line.substr(equals + 1);
    if (name == "version") info.version = value;
    if (name == "cuda_architectures") info.cuda_architectures = detail::split(value);
    if (name == "cuda_head_dims") info.cuda_head_dims = detail::split(value);
    if (name == "cpu_instruction_sets") info.cpu_instruction_sets = detail::split(value);
    if (name == "cpu_instruction_set_used") info.cpu_instruction_set_used = value;
    if (name == "torch_headers") info.torch_headers = value;
  }
  return info;
}

}  // namespace flashtile
