// The part of flashtile/torch.h that calls forward and backward of attention, with autograd.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "torch_ops.h"
#include "torch_options.h"

namespace flashtile {

namespace detail {

using Gradients = torch::autograd::variable_list;
using torch::autograd::AutogradContext;

// How to attend, beside the tensors; options.out is unset.
struct Call {
  AttentionOptions options = {};
  std::optional<Sequences> sequences = std::nullopt;

  void push(Stack& stack) const {
    push_options(stack, options);
    push_sequences(stack, sequences);
    push_scores(stack, options);
  }
};

// A call as autograd keeps it. Its tensors are saved by themselves: autograd watches those.
struct KeptCall : torch::CustomClassHolder {
  explicit KeptCall(const Call& kept) : call(kept) {}
  Call call;
};

using Forward = std::tuple<at::Tensor, at::Tensor>;

inline Forward call_forward(TensorRef q, TensorRef k, TensorRef v, const Call& call) {
  static const Op op("flashtile::forward");
  Stack stack = {q, k, v};
  call.push(stack);
  op(stack);
  return {stack[0].toTensor(), stack[1].toTensor()};
}

inline at::Tensor call_forward_out(TensorRef q, TensorRef k, TensorRef v, TensorRef out,
                                   const Call& call) {
  static const Op op("flashtile::forward_out");
  Stack stack = {q, k, v, out};
  call.push(stack);
  op(stack);
  return stack[0].toTensor();
}

// Which gradients are wanted beside those of q, k, v: of alibi_slopes, bias, bias2 and sink.
using Wanted = std::array<bool, 4>;

inline bool any(const Wanted& wanted) { return wanted[0] || wanted[1] || wanted[2] || wanted[3]; }

// What the backward op reads beside the tensors that it is differentiated in.
struct Saved {
  at::Tensor out, softmax_lse;
  std::optional<at::Tensor> dlse = std::nullopt;  // unset: zero
  Call call = {};
  Wanted wanted = {};
};

// dq, dk, dv and those of scores that are wanted.
inline Gradients call_backward(TensorRef dout, TensorRef q, TensorRef k, TensorRef v,
                               const Saved& saved) {
  static const Op op("flashtile::backward"), op_scores("flashtile::backward_scores");
  const at::Context& context = at::globalContext();
  Call call = saved.call;
  call.options.deterministic |=
      context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  Stack stack = {dout, q, k, v, saved.out, saved.softmax_lse, saved.dlse};
  call.push(stack);
  const Wanted& wanted = saved.wanted;
  if (any(wanted)) {
    torch::jit::push(stack, wanted[0], wanted[1], wanted[2], wanted[3]);
    op_scores(stack);
  } else {
    op(stack);
  }
  Gradients results;
  for (size_t i = 0; i < stack.size(); ++i) {
    if (i < 3 || wanted[i - 3]) results.push_back(stack[i].toTensor());
  }
  return results;
}

// A copy is made only of gradients whose layout torch chose badly: the ops want stride 1 in the
// last dimension, where the gradient of out.sum() has 0, and on CUDA rows that begin at 16 bytes.
inline at::Tensor readable(const at::Tensor& gradient) {
  bool good = gradient.size(-1) <= 1 || gradient.stride(-1) == 1;
  if (gradient.is_cuda()) {
    const int64_t step = 16 / gradient.element_size();
    good = good && gradient.storage_offset() % step == 0;
    for (int64_t dim = 0; dim + 1 < gradient.dim(); ++dim) {
      good = good && gradient.stride(dim) % step == 0;
    }
  }
  return good ? gradient : gradient.clone(at::MemoryFormat::Contiguous);
}

// dq, dk, dv as a node of their own, so that a second derivative is an error and not a missing
// term.
struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static Gradients forward(AutogradContext*, const at::Tensor& dout, const at::Tensor& q,
                           const at::Tensor& k, const at::Tensor& v, const Saved& saved) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(dout, q, k, v, saved);
  }
  static Gradients backward(AutogradContext*, const Gradients&) {
    throw std::runtime_error(
        "attention was differentiated twice; allowed: first derivatives only "
        "(use torch's math attention for second derivatives)");
  }
};

// An absent tensor is saved as an undefined one.
inline at::Tensor saveable(OptionalRef tensor) { return tensor.value_or(at::Tensor()); }
inline std::optional<at::Tensor> restored(TensorRef tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// The tensors of scores, with those first that have gradients.
inline std::array<std::optional<at::Tensor>*, 7> tensors_of_scores(AttentionOptions& options) {
  return {&options.alibi_slopes, &options.bias,      &options.bias2,      &options.sink,
          &options.mask,         &options.rng_state, &options.query_scale};
}

inline Gradients tensors_with_gradients(const AttentionOptions& options) {
  Gradients tensors;
  for (const std::optional<at::Tensor>& tensor :
       {options.alibi_slopes, options.bias, options.bias2, options.sink}) {
    if (tensor.has_value()) tensors.push_back(*tensor);
  }
  return tensors;
}

struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  // `of_scores`: those with gradients, which autograd looks at; the call has them, too.
  static Gradients forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const Call& call, at::TensorList /*of_scores*/) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, softmax_lse] = call_forward(q, k, v, call);
    Gradients saved = {q, k, v, out, softmax_lse};
    auto kept = c10::make_intrusive<KeptCall>(call);
    for (std::optional<at::Tensor>* const tensor : tensors_of_scores(kept->call.options)) {
      saved.push_back(saveable(*tensor));
      tensor->reset();
    }
    if (kept->call.sequences.has_value()) {
      Sequences& s = *kept->call.sequences;
      saved.insert(saved.end(),
                   {s.cu_seqlens_q, s.cu_seqlens_k, saveable(s.seqused_q), saveable(s.seqused_k)});
      s.cu_seqlens_q = s.cu_seqlens_k = at::Tensor();
      s.seqused_q = s.seqused_k = std::nullopt;
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["call"] = c10::IValue::make_capsule(std::move(kept));
    context->set_materialize_grads(false);
    return {out, softmax_lse};
  }

  static Gradients backward(AutogradContext* context, const Gradients& gradients) {
    const Gradients t = context->get_saved_variables();
    const auto kept = context->saved_data["call"].toCapsule();
    Saved saved = {
        .out = t[3], .softmax_lse = t[4], .call = static_cast<const KeptCall&>(*kept).call};
    size_t read = 5;
    for (std::optional<at::Tensor>* const tensor : tensors_of_scores(saved.call.options))
      *tensor = restored(t[read++]);
    if (saved.call.sequences.has_value()) {
      Sequences& s = *saved.call.sequences;
      s.cu_seqlens_q = t[read++];
      s.cu_seqlens_k = t[read++];
      s.seqused_q = restored(t[read++]);
      s.seqused_k = restored(t[read++]);
    }
    Gradients result(4);  // of q, k, v and the call; then of the tensors in of_scores
    Gradients of_scores;
    for (size_t i = 0; i < saved.wanted.size(); ++i) {
      const std::optional<at::Tensor>& tensor = *tensors_of_scores(saved.call.options)[i];
      saved.wanted[i] = tensor.has_value() && tensor->requires_grad();
      if (tensor.has_value()) of_scores.emplace_back(saved.wanted[i] ? *tensor : at::Tensor());
    }
    result.resize(4 + of_scores.size());
    if (!gradients[0].defined() && !gradients[1].defined()) return result;
    const at::Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(saved.out);
    if (gradients[1].defined()) saved.dlse = gradients[1].contiguous();
    const Gradients all = BackwardFunction::apply(readable(dout), t[0], t[1], t[2], saved);
    std::copy(all.begin(), all.begin() + 3, result.begin());
    for (size_t i = 0, next = 3; i < of_scores.size(); ++i) {
      if (of_scores[i].defined()) result[4 + i] = all[next++];
    }
    return result;
  }
};

}  // namespace detail

}  // namespace flashtile
