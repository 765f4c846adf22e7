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

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace flashtile {

// Where query i stands among the keys: at i + seqlen_k - seqlen_q, or at i.
enum class CausalAlignment : int64_t { kBottomRight = 0, kTopLeft = 1 };

// How to attend. New options are added at the end.
struct AttentionOptions {
  bool causal = false;  // no query sees a key behind its own position: window_size.second is 0
  std::optional<double> softmax_scale = std::nullopt;  // factor on q k^T; unset: 1 / sqrt(head_dim)
  bool return_lse = false;                             // also return softmax_lse
  CausalAlignment causal_alignment = CausalAlignment::kBottomRight;  // of causal and window_size
  // (left, right): a query at position p sees keys p - left to p + right; -1: no bound
  std::pair<int64_t, int64_t> window_size = {-1, -1};
  bool deterministic = false;  // gradients bitwise equal from run to run; so does torch's own flag
  // Written and returned as out. Shaped like it, any strides that keep its elements apart, the last
  // one 1; shares no memory with q, k, v. Only where no gradient is wanted.
  std::optional<at::Tensor> out = std::nullopt;
};

// Where the packed sequences of attention_varlen begin and end. New members are added at the end.
struct Sequences {
  at::Tensor cu_seqlens_q;   // (batch + 1), int32, contiguous, on q's device: first row of each;
  at::Tensor cu_seqlens_k;   // rows from the last one on belong to no sequence
  int64_t max_seqlen_q = 0;  // rows of the longest; a hint, on which no result depends
  int64_t max_seqlen_k = 0;
  // (batch), int32, contiguous: rows in use of every sequence, from its first; unset: all. The
  // others are not read, and have out 0, softmax_lse -inf and gradients 0.
  std::optional<at::Tensor> seqused_q = std::nullopt;
  std::optional<at::Tensor> seqused_k = std::nullopt;
  // On CUDA, check the values above by assertions on the device, for which the host does not wait.
  // On the CPU they are always checked.
  bool check = false;
};

struct AttentionResult {
  at::Tensor out;          // shaped like q, with head_dim_v; contiguous if new; in the dtype of q
  at::Tensor softmax_lse;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q), fp32, for
                           // fp64 inputs fp64; undefined unless return_lse
};

namespace detail {

using Gradients = torch::autograd::variable_list;
using torch::autograd::AutogradContext;

// The options of the op schemas.
struct Call {
  std::optional<double> softmax_scale = {};
  int64_t window_left = -1;   // FLASHTILE_UNLIMITED
  int64_t window_right = -1;  // 0 is causal
  bool deterministic = false;
  int64_t alignment = 0;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  std::optional<at::Tensor> cu_seqlens_q = {}, cu_seqlens_k = {};  // unset: dense
  std::optional<at::Tensor> seqused_q = {}, seqused_k = {};
};

using TensorRef = const at::Tensor&;
using OptionalRef = const std::optional<at::Tensor>&;

// Refusals are the sentence and nothing else, as those of the ops are: what() of TORCH_CHECK's
// exception would go on with a backtrace.
inline void raise_unless(bool allowed, const char* sentence) {
  if (!allowed) throw std::runtime_error(sentence);
}
using Forward = std::tuple<at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// An op that takes tensors and then the options.
template <class Result, class... Tensors>
class Op {
 public:
  explicit Op(const char* name) : handle_(find(name)) {}
  Result operator()(Tensors... tensors, const Call& call) const {
    return handle_.call(tensors..., call.softmax_scale, call.window_left, call.window_right,
                        call.deterministic, call.alignment, call.max_seqlen_q, call.max_seqlen_k,
                        call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k);
  }

 private:
  using Signature = Result(Tensors..., std::optional<double>, c10::SymInt, c10::SymInt, bool,
                           int64_t, c10::SymInt, c10::SymInt, OptionalRef, OptionalRef, OptionalRef,
                           OptionalRef);
  static c10::TypedOperatorHandle<Signature> find(const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (op.has_value()) return op->typed<Signature>();
    throw std::runtime_error(std::string("the op ") + name +
                             " is not registered; allowed: a process with libflashtile_torch.so, "
                             "which the CMake target flashtile::torch links");
  }
  c10::TypedOperatorHandle<Signature> handle_;
};

inline Forward call_forward(TensorRef q, TensorRef k, TensorRef v, const Call& call) {
  static const Op<Forward, TensorRef, TensorRef, TensorRef> op("flashtile::forward");
  return op(q, k, v, call);
}

inline at::Tensor call_forward_out(TensorRef q, TensorRef k, TensorRef v, at::Tensor& out,
                                   const Call& call) {
  static const Op<at::Tensor, TensorRef, TensorRef, TensorRef, at::Tensor&> op(
      "flashtile::forward_out");
  return op(q, k, v, out, call);
}

// What the backward op reads beside the tensors that it is differentiated in.
struct Saved {
  at::Tensor out, softmax_lse;
  std::optional<at::Tensor> dlse = {};  // unset: zero
  Call call = {};
};

inline Backward call_backward(TensorRef dout, TensorRef q, TensorRef k, TensorRef v,
                              const Saved& saved) {
  static const Op<Backward, TensorRef, TensorRef, TensorRef, TensorRef, TensorRef, TensorRef,
                  OptionalRef>
      op("flashtile::backward");
  const at::Context& context = at::globalContext();
  Call call = saved.call;
  call.deterministic |=
      context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  return op(dout, q, k, v, saved.out, saved.softmax_lse, saved.dlse, call);
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

struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  static Gradients forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, softmax_lse] = call_forward(q, k, v, call);
    context->save_for_backward({q, k, v, out, softmax_lse, saveable(call.cu_seqlens_q),
                                saveable(call.cu_seqlens_k), saveable(call.seqused_q),
                                saveable(call.seqused_k)});
    auto& data = context->saved_data;
    data["softmax_scale"] = call.softmax_scale;
    data["window_left"] = call.window_left;
    data["window_right"] = call.window_right;
    data["deterministic"] = call.deterministic;
    data["alignment"] = call.alignment;
    data["max_seqlen_q"] = call.max_seqlen_q;
    data["max_seqlen_k"] = call.max_seqlen_k;
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
                  .window_right = data["window_right"].toInt(),
                  .deterministic = data["deterministic"].toBool(),
                  .alignment = data["alignment"].toInt(),
                  .max_seqlen_q = data["max_seqlen_q"].toInt(),
                  .max_seqlen_k = data["max_seqlen_k"].toInt(),
                  .cu_seqlens_q = restored(t[5]),
                  .cu_seqlens_k = restored(t[6]),
                  .seqused_q = restored(t[7]),
                  .seqused_k = restored(t[8])};
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

// A forward-mode tangent would get lost in silence.
inline void refuse_tangents(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    raise_unless(!tensor->_fw_grad(/*level=*/0).defined(),
                 "an input carries a forward-mode tangent; allowed: reverse mode (use torch's math "
                 "attention for forward mode)");
  }
}

using Named = std::pair<const char*, const at::Tensor*>;

inline bool wants_gradient(TensorRef tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

// Of a call that writes: `why`, like "out is a tensor", and `where`, like "out".
inline void refuse_gradients(const std::string& why, const std::string& where,
                             std::initializer_list<Named> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!wants_gradient(*tensor)) continue;
    throw std::runtime_error(why + " and " + name +
                             " requires grad; allowed: none, or at::NoGradGuard, as what is "
                             "written into " +
                             where + " has no gradient");
  }
}

inline AttentionResult attend(TensorRef q, TensorRef k, TensorRef v, Call call,
                              const AttentionOptions& options) {
  call.softmax_scale = options.softmax_scale;
  std::tie(call.window_left, call.window_right) = options.window_size;
  if (options.causal) call.window_right = 0;
  call.deterministic = options.deterministic;
  call.alignment = static_cast<int64_t>(options.causal_alignment);
  refuse_tangents({&q, &k, &v});
  AttentionResult result;
  if (options.out.has_value()) {
    result.out = *options.out;
    refuse_gradients("out is a tensor", "out",
                     {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &result.out}});
    result.softmax_lse = call_forward_out(autocast(q), autocast(k), autocast(v), result.out, call);
  } else {
    const Gradients both = ForwardFunction::apply(autocast(q), autocast(k), autocast(v), call);
    result = {both[0], both[1]};
  }
  if (!options.return_lse) result.softmax_lse.reset();
  return result;
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

}  // namespace detail

// out = softmax(softmax_scale * q k^T + mask) v, per batch and head, in memory linear in the
// length.
//
// q (batch, seqlen_q, num_heads, head_dim); k (batch, seqlen_k, num_heads_kv, head_dim) and v
// (batch, seqlen_k, num_heads_kv, head_dim_v), where num_heads_kv divides num_heads and query head
// h reads key head h / (num_heads / num_heads_kv). fp16, bf16, fp32, fp64 on the CPU, fp16 and bf16
// on CUDA; any strides, 1 in the last dimension; nothing is copied. CUDA work goes to the current
// stream and is not waited for.
//
// Differentiable once in q, k and v, through out and softmax_lse. Throws std::runtime_error, whose
// what() is one sentence that names the argument, its value and what is allowed.
inline AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionOptions& options = {}) {
  return detail::attend(q, k, v, {}, options);
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
  const detail::Call call = {.max_seqlen_q = sequences.max_seqlen_q,
                             .max_seqlen_k = sequences.max_seqlen_k,
                             .cu_seqlens_q = sequences.cu_seqlens_q,
                             .cu_seqlens_k = sequences.cu_seqlens_k,
                             .seqused_q = sequences.seqused_q,
                             .seqused_k = sequences.seqused_k};
  return detail::attend(q, k, v, call, options);
}

}  // namespace flashtile

#include "torch_kvcache.h"
