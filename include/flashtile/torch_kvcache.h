// The part of flashtile/torch.h that is about a key/value cache.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "torch_autograd.h"
#include "torch_ops.h"
#include "torch_options.h"

namespace flashtile {

namespace detail {

// What goes to the ops: members of the cache under their own names, tensors cast.
struct CacheCall {
  at::Tensor q;
  KVCache cache;
  KVCacheOptions options;
};

inline void append_kv(const CacheCall& call, const NewKeys& added) {
  static const Op op("flashtile::append_kv");
  const auto& [q, cache, options] = call;
  Stack stack = {cache.k, cache.v, added.k, added.v};
  push_places(stack, cache, options);
  op(stack);
}

// Returns q, rotated.
inline at::Tensor append_kv_rotary(const CacheCall& call, const NewKeys& added) {
  static const Op op("flashtile::append_kv_rotary");
  const auto& [q, cache, options] = call;
  const bool q_fixed =
      !options.causal && options.window_size == std::pair<int64_t, int64_t>(-1, -1);
  Stack stack = {cache.k, cache.v, added.k, added.v, q};
  torch::jit::push(stack, added.rotary_cos, added.rotary_sin, added.rotary_interleaved, q_fixed);
  push_places(stack, cache, options);
  op(stack);
  return stack[0].toTensor();
}

inline Forward read_kvcache(TensorRef q, const CacheCall& call) {
  static const Op op("flashtile::forward_kvcache"), op_out("flashtile::forward_kvcache_out");
  const std::optional<at::Tensor>& out = call.options.out;
  Stack stack = {q, call.cache.k, call.cache.v};
  if (out.has_value()) stack.emplace_back(*out);
  push_options(stack, call.options);
  push_cache(stack, call.cache, call.options);
  push_scores(stack, call.options);
  if (!out.has_value()) {
    op(stack);
    return {stack[0].toTensor(), stack[1].toTensor()};
  }
  op_out(stack);
  return {*out, stack[0].toTensor()};
}

// Appends, if there is something to append, and attends.
inline Forward append_and_read(const CacheCall& call) {
  const std::optional<NewKeys>& added = call.options.append;
  if (!added.has_value()) return read_kvcache(call.q, call);
  if (added->rotary_cos.has_value()) return read_kvcache(append_kv_rotary(call, *added), call);
  append_kv(call, *added);
  return read_kvcache(call.q, call);
}

// The node of a result over a cache: going backward through it throws, as there is no gradient.
struct CacheFunction : torch::autograd::Function<CacheFunction> {
  static Gradients forward(AutogradContext*, const Forward& result, at::TensorList /*read*/) {
    return {std::get<0>(result), std::get<1>(result)};
  }
  static Gradients backward(AutogradContext*, const Gradients&) {
    throw std::runtime_error(
        "attention_with_kvcache was differentiated; allowed: its result without a gradient "
        "(attention and attention_varlen have one)");
  }
};

inline bool is_autocast(TensorRef cache) {
  const at::DeviceType device = cache.device().type();
  return (device == at::kCPU || device == at::kCUDA) && at::autocast::is_autocast_enabled(device);
}

// Under torch's autocast 16 and 32 bit tensors follow the cache, which is never cast.
inline at::Tensor autocast_like(TensorRef tensor, TensorRef cache) {
  const auto low = [](at::ScalarType dtype) {
    return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat;
  };
  if (!low(tensor.scalar_type()) || !low(cache.scalar_type())) return tensor;
  return tensor.to(cache.scalar_type());
}

// What is written must not need a gradient. Returns whether anything that is read wants one.
inline bool check_gradients(TensorRef q, const KVCache& cache, const KVCacheOptions& options) {
  if (!at::GradMode::is_enabled()) return false;
  const Tensors scores = score_tensors(options);
  const Named k = {"cache.k", &cache.k}, v = {"cache.v", &cache.v};
  bool wanted = q.requires_grad() || cache.k.requires_grad() || cache.v.requires_grad();
  for (const at::Tensor& tensor : scores) wanted |= tensor.requires_grad();
  if (options.out.has_value()) refuse_score_gradients(options);
  if (options.out.has_value())
    refuse_gradients("out is a tensor", "out", {{"q", &q}, k, v, {"out", &*options.out}});
  if (!options.append.has_value()) return wanted;
  const at::Tensor &k_new = options.append->k, &v_new = options.append->v;
  refuse_gradients("append is set", "the cache", {k, v});
  if (options.out.has_value())
    refuse_gradients("out is a tensor", "out", {{"append.k", &k_new}, {"append.v", &v_new}});
  return wanted || k_new.requires_grad() || v_new.requires_grad();
}

// A member of the cache under its name or its earlier one.
inline std::optional<at::Tensor> either(const char* name, OptionalRef value, OptionalRef earlier) {
  if (!earlier.has_value()) return value;
  raise_unless(!value.has_value(), std::string("cache_") + name + " and " + name +
                                       " are set; allowed: cache_" + name + ", its name");
  return earlier;
}

// Under autocast, with what meets the cache in its dtype.
inline void cast_like_cache(CacheCall& call) {
  const at::Tensor& cache = call.cache.k;
  if (!is_autocast(cache)) return;
  call.q = autocast_like(call.q, cache);
  if (!call.options.append.has_value()) return;
  NewKeys& added = *call.options.append;
  added.k = autocast_like(added.k, cache);
  added.v = autocast_like(added.v, cache);
  for (std::optional<at::Tensor>* table : {&added.rotary_cos, &added.rotary_sin}) {
    if (table->has_value()) *table = autocast_like(**table, cache);
  }
}

// What no op can refuse, since it does not see it; then the call as the ops take it.
inline CacheCall checked(TensorRef q, const KVCache& cache, const KVCacheOptions& options,
                         bool wants_gradient) {
  refuse_tangents({&q, &cache.k, &cache.v});
  for (const at::Tensor& tensor : score_tensors(options)) refuse_tangents({&tensor});
  check_score_devices(q, options);
  if (options.append.has_value()) refuse_tangents({&options.append->k, &options.append->v});
  CacheCall call = {q, cache, options};
  call.cache.cache_seqlens = either("seqlens", cache.cache_seqlens, cache.seqlens);
  call.cache.cache_batch_idx = either("batch_idx", cache.cache_batch_idx, cache.batch_idx);
  call.cache.cache_leftpad = either("leftpad", cache.cache_leftpad, cache.leftpad);
  if (options.append.has_value()) {
    const NewKeys& added = *options.append;
    raise_unless(call.cache.cache_seqlens.has_value(),
                 "cache_seqlens is unset; allowed: a tensor, which says where append.k belongs");
    raise_unless(added.rotary_cos.has_value() == added.rotary_sin.has_value(),
                 "one of rotary_cos and rotary_sin is unset; allowed: both or neither");
  }
  cast_like_cache(call);
  if (wants_gradient) refuse_narrow_gradient(call.q, cache.k, cache.v);
  return call;
}

}  // namespace detail

// Attention of new queries over a cache, into which options.append is written first, in place. q is
// (batch, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens_q,
// which serves prefill and decoding in one call. A new row that has no place in the cache is an
// error on the CPU, before anything is written; on CUDA it is not written. The bits of a sequence's
// result depend on num_splits and on the sequence alone. Without gradients: tensors may require
// grad, but going backward throws. Under autocast q, new rows and tables take the cache's dtype.
//
// On the CPU the cache and what is appended may have 16 bits, fp16 or bf16, under fp32 q: without
// rotation, and only where no gradient is wanted.
inline AttentionResult attention_with_kvcache(const at::Tensor& q, const KVCache& cache,
                                              const KVCacheOptions& options = {}) {
  const bool differentiable = detail::check_gradients(q, cache, options);
  const auto attend = [&] {
    const at::NoGradGuard guard;
    return detail::append_and_read(detail::checked(q, cache, options, differentiable));
  };
  auto [out, lse] = attend();
  if (differentiable) {
    detail::Tensors read = detail::score_tensors(options);
    read.insert(read.end(), {q, cache.k, cache.v});
    if (options.append.has_value()) read.insert(read.end(), {options.append->k, options.append->v});
    const detail::Gradients both =
        detail::CacheFunction::apply(detail::Forward{out, lse}, at::TensorList(read));
    out = both[0];
    lse = both[1];
  }
  return {out, options.return_lse ? lse : at::Tensor()};
}

// Whether attention_with_kvcache would run: makes the checks and the choice of kernel that the call
// makes, of its append and of what it reads, and neither writes nor computes anything. Values of
// lengths, tables and indices are looked at where the call itself would throw for them, on the CPU.
inline CanRun can_run_with_kvcache(const at::Tensor& q, const KVCache& cache,
                                   const KVCacheOptions& options = {}) {
  static const detail::Op op("flashtile::can_run_kvcache");
  return detail::answer_of([&](detail::Stack& stack) {
    const bool differentiable = detail::check_gradients(q, cache, options);
    const at::NoGradGuard guard;
    const detail::CacheCall call = detail::checked(q, cache, options, differentiable);
    torch::jit::push(stack, call.q, cache.k, cache.v);
    if (call.options.append.has_value()) {
      const NewKeys& added = *call.options.append;
      torch::jit::push(stack, added.k, added.v, added.rotary_cos, added.rotary_sin);
    } else {
      stack.resize(stack.size() + 4);  // none of them
    }
    stack.emplace_back(options.out);
    detail::push_options(stack, options);
    detail::push_cache(stack, call.cache, call.options);
    detail::push_scores(stack, call.options);
    op(stack);
  });
}

// Throws what a call with `check` has found on a CUDA device since the last look. Does not wait:
// synchronise the stream before, to hear of everything that was enqueued.
inline void raise_pending_checks() {
  static const detail::Op op("flashtile::raise_pending_checks");
  detail::Stack stack;
  op(stack);
}

}  // namespace flashtile
