// flashtile for libtorch: attention on at::Tensor with autograd. Header-only, no Python.
//
//   #include <flashtile/torch.h>
//   auto [out, softmax_lse] = flashtile::attention(q, k, v, {.causal = true, .return_lse = true});
//
// Calls the ops of libflashtile_torch.so through the dispatcher and registers nothing, so it lives
// beside the Python package. Link the CMake target flashtile::torch, which keeps that library.
//
// Contract, as in flashtile.h: softmax_lse is a natural logarithm, fp32; a row that sees no key has
// out 0, softmax_lse -inf and gradients 0; the causal mask is aligned bottom-right.
#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace flashtile {

// How to attend. New options are added at the end.
struct AttentionOptions {
  bool causal = false;  // query i sees key j only if j <= i + seqlen_k - seqlen_q
  std::optional<double> softmax_scale = std::nullopt;  // factor on q k^T; unset: 1 / sqrt(head_dim)
  bool return_lse = false;                             // also return softmax_lse
};

// Where the packed sequences of attention_varlen begin and end.
struct Sequences {
  at::Tensor cu_seqlens_q;   // (batch + 1), int32, contiguous, on q's device: first row of each
  at::Tensor cu_seqlens_k;   // (batch + 1), int32; both end with the number of rows
  int64_t max_seqlen_q = 0;  // rows of the longest; a hint, on which no result depends
  int64_t max_seqlen_k = 0;
};

struct AttentionResult {
  at::Tensor out;          // shaped like q, contiguous, in the dtype of q
  at::Tensor softmax_lse;  // fp32 (batch, num_heads, seqlen_q), varlen (num_heads, total_q);
                           // undefined unless return_lse
};

namespace detail {

using Gradients = torch::autograd::variable_list;
using torch::autograd::AutogradContext;

// Everything about a call that is not differentiated.
struct Call {
  std::optional<Sequences> sequences = {};  // unset: dense
  std::optional<double> softmax_scale = {};
  int64_t window_left = -1;   // FLASHTILE_UNLIMITED
  int64_t window_right = -1;  // 0 is causal
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(op.has_value(), "flashtile: the op ", name,
              " is not registered; allowed: a process with libflashtile_torch.so, which the CMake "
              "target flashtile::torch links");
  return op->typed<Signature>();
}

using TensorRef = const at::Tensor&;
using Forward = std::tuple<at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline Forward call_forward(TensorRef q, TensorRef k, TensorRef v, const Call& call) {
  if (!call.sequences.has_value()) {
    static const auto op =
        find_op<Forward(TensorRef, TensorRef, TensorRef, std::optional<double>, int64_t, int64_t)>(
            "flashtile::forward");
    return op.call(q, k, v, call.softmax_scale, call.window_left, call.window_right);
  }
  static const auto op =
      find_op<Forward(TensorRef, TensorRef, TensorRef, TensorRef, TensorRef, c10::SymInt,
                      c10::SymInt, std::optional<double>, int64_t, int64_t)>(
          "flashtile::forward_varlen");
  const Sequences& seq = *call.sequences;
  return op.call(q, k, v, seq.cu_seqlens_q, seq.cu_seqlens_k, seq.max_seqlen_q, seq.max_seqlen_k,
                 call.softmax_scale, call.window_left, call.window_right);
}

// What the backward op reads beside the tensors that it is differentiated in.
struct Saved {
  at::Tensor out, softmax_lse;
  std::optional<at::Tensor> dlse = {};  // unset: zero
  Call call = {};
};

inline Backward call_backward(TensorRef dout, TensorRef q, TensorRef k, TensorRef v,
                              const Saved& saved) {
  const Call& call = saved.call;
  const at::Context& context = at::globalContext();
  const bool deterministic =
      context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  if (!call.sequences.has_value()) {
    static const auto op =
        find_op<Backward(TensorRef, TensorRef, TensorRef, TensorRef, TensorRef, TensorRef,
                         const std::optional<at::Tensor>&, std::optional<double>, int64_t, int64_t,
                         bool)>("flashtile::backward");
    return op.call(dout, q, k, v, saved.out, saved.softmax_lse, saved.dlse, call.softmax_scale,
                   call.window_left, call.window_right, deterministic);
  }
  static const auto op =
      find_op<Backward(TensorRef, TensorRef, TensorRef, TensorRef, TensorRef, TensorRef,
                       const std::optional<at::Tensor>&, TensorRef, TensorRef, c10::SymInt,
                       c10::SymInt, std::optional<double>, int64_t, int64_t, bool)>(
          "flashtile::backward_varlen");
  const Sequences& seq = *call.sequences;
  return op.call(dout, q, k, v, saved.out, saved.softmax_lse, saved.dlse, seq.cu_seqlens_q,
                 seq.cu_seqlens_k, seq.max_seqlen_q, seq.max_seqlen_k, call.softmax_scale,
                 call.window_left, call.window_right, deterministic);
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
    auto [dq, dk, dv] = call_backward(dout, q, k, v, saved);
    return {dq, dk, dv};
  }
  static Gradients backward(AutogradContext*, const Gradients&) {
    TORCH_CHECK(false,
                "flashtile: attention was differentiated twice; allowed: first derivatives only "
                "(use torch's math attention for second derivatives)");
  }
};

struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  static Gradients forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, softmax_lse] = call_forward(q, k, v, call);
    Gradients saved = {q, k, v, out, softmax_lse};
    context->saved_data["dense"] = !call.sequences.has_value();
    if (call.sequences.has_value()) {
      saved.push_back(call.sequences->cu_seqlens_q);
      saved.push_back(call.sequences->cu_seqlens_k);
      context->saved_data["max_seqlen_q"] = call.sequences->max_seqlen_q;
      context->saved_data["max_seqlen_k"] = call.sequences->max_seqlen_k;
    }
    context->saved_data["softmax_scale"] = call.softmax_scale;
    context->saved_data["window_left"] = call.window_left;
    context->saved_data["window_right"] = call.window_right;
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    return {out, softmax_lse};
  }

  static Gradients backward(AutogradContext* context, const Gradients& gradients) {
    if (!gradients[0].defined() && !gradients[1].defined()) return Gradients(4);
    const Gradients t = context->get_saved_variables();
    auto& data = context->saved_data;
    Saved saved = {.out = t[3], .softmax_lse = t[4]};
    saved.call = {.softmax_scale = data["softmax_scale"].toOptional<double>(),
                  .window_left = data["window_left"].toInt(),
                  .window_right = data["window_right"].toInt()};
    if (!data["dense"].toBool()) {
      saved.call.sequences = {t[5], t[6], data["max_seqlen_q"].toInt(),
                              data["max_seqlen_k"].toInt()};
    }
    const at::Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(saved.out);
    if (gradients[1].defined()) saved.dlse = gradients[1].contiguous();
    Gradients result = BackwardFunction::apply(readable(dout), t[0], t[1], t[2], saved);
    result.emplace_back();  // of call
    return result;
  }
};

// Under torch's autocast 16 and 32 bit inputs become its dtype, as in torch's own attention.
inline at::Tensor autocast(const at::Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  const bool known = device == at::kCPU || device == at::kCUDA;
  if (!known || !at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

inline AttentionResult attend(TensorRef q, TensorRef k, TensorRef v, const Call& call,
                              bool return_lse) {
  const Gradients result = ForwardFunction::apply(autocast(q), autocast(k), autocast(v), call);
  return {result[0], return_lse ? result[1] : at::Tensor()};
}

inline int64_t window_right(const AttentionOptions& options) { return options.causal ? 0 : -1; }

}  // namespace detail

// out = softmax(softmax_scale * q k^T + mask) v, per batch and head, in memory linear in the
// length.
//
// q (batch, seqlen_q, num_heads, head_dim); k and v (batch, seqlen_k, num_heads_kv, head_dim),
// where num_heads_kv divides num_heads and query head h reads key head h / (num_heads /
// num_heads_kv). fp16, bf16, fp32, fp64 on the CPU, fp16 and bf16 on CUDA; any strides, 1 in the
// last dimension; nothing is copied. CUDA work goes to the current stream and is not waited for.
//
// Differentiable once in q, k and v, through out and softmax_lse. Throws c10::Error or
// std::runtime_error with a sentence that names the argument, its value and what is allowed.
inline AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionOptions& options = {}) {
  const detail::Call call = {.softmax_scale = options.softmax_scale,
                             .window_right = detail::window_right(options)};
  return detail::attend(q, k, v, call, options.return_lse);
}

// The same over packed sequences: q (total_q, num_heads, head_dim), k and v (total_k, num_heads_kv,
// head_dim). Sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1] - 1.
inline AttentionResult attention_varlen(const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& v, const Sequences& sequences,
                                        const AttentionOptions& options = {}) {
  const detail::Call call = {.sequences = sequences,
                             .softmax_scale = options.softmax_scale,
                             .window_right = detail::window_right(options)};
  return detail::attend(q, k, v, call, options.return_lse);
}

}  // namespace flashtile
