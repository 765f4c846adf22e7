// The part of flashtile/torch.h, which includes it, that is about a key/value cache.
#pragma once

namespace flashtile {

// A key/value cache, and what a call appends to it. New members are added at the end.
//
// k and v are (batch_cache, seqlen_cache, num_heads_kv, head_dim), where sequence b owns entry
// batch_idx[b] (unset: b), or with block_table pages, (num_pages, page_size, ...): row j of
// sequence b is row j % page_size of page block_table[b][j / page_size]. All numbers are int32 on
// the cache's device; none is waited for, and none, however wrong, makes a call touch memory
// outside the tensors.
struct KVCache {
  at::Tensor k, v;
  std::optional<at::Tensor> seqlens = std::nullopt;      // (batch): rows in use; unset: all
  std::optional<at::Tensor> batch_idx = std::nullopt;    // (batch)
  std::optional<at::Tensor> leftpad = std::nullopt;      // (batch): first rows that nobody sees
  std::optional<at::Tensor> block_table = std::nullopt;  // (batch, max_blocks)
};

// Rows that attention_with_kvcache writes into the cache, behind those in use, before it reads.
struct NewKeys {
  at::Tensor k, v;  // (batch, seqlen_new, num_heads_kv, head_dim); (total_q, ...) with packed q
  // Both or neither: (seqlen_rotary, rotary_dim / 2); q and k are rotated by their position.
  std::optional<at::Tensor> rotary_cos = std::nullopt;
  std::optional<at::Tensor> rotary_sin = std::nullopt;
  bool rotary_interleaved = true;  // pairs (2 d, 2 d + 1); else (d, d + rotary_dim / 2)
};

struct KVCacheOptions {
  std::optional<NewKeys> append = std::nullopt;
  std::optional<at::Tensor> cu_seqlens_q = std::nullopt;  // (batch + 1): q is packed
  int64_t max_seqlen_q = 0;                               // then a hint
  bool causal = false;                                    // as in AttentionOptions
  std::pair<int64_t, int64_t> window_size = {-1, -1};
  std::optional<double> softmax_scale = std::nullopt;
  int64_t num_splits = 0;  // parts of a sequence's keys at most; 0: from its length
  bool return_lse = false;
  // Report wrong numbers of the cache: on the CPU by throwing at once, on CUDA, for which the host
  // does not wait, by throwing from a later call that checks or from raise_pending_checks(); the
  // first such call on a device allocates what the device writes to, so make it before a capture.
  // FLASHTILE_CHECK=1 in the environment: every call over a cache checks. New rows that have no
  // place are an error on the CPU, with check or without, and nothing is written.
  bool check = false;
  CausalAlignment causal_alignment = CausalAlignment::kBottomRight;  // of causal and window_size
  // Written and returned as out; as in AttentionOptions, and it shares no memory with the cache.
  std::optional<at::Tensor> out = std::nullopt;
};

namespace detail {

// An op of the cache by its name and signature.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// cache.seqlens is set.
inline void append_kv(const KVCache& cache, const NewKeys& added, const KVCacheOptions& options) {
  using Signature = void(at::Tensor&, at::Tensor&, TensorRef, TensorRef, TensorRef, OptionalRef,
                         OptionalRef, OptionalRef, bool);
  static const auto op = find_op<Signature>("flashtile::append_kv");
  at::Tensor k = cache.k, v = cache.v;
  // NOLINTNEXTLINE(bugprone-unchecked-optional-access)
  op.call(k, v, added.k, added.v, *cache.seqlens, cache.batch_idx, cache.block_table,
          options.cu_seqlens_q, options.check);
}

// Returns q, rotated. cache.seqlens and both tables are set.
inline at::Tensor append_kv_rotary(TensorRef q, const KVCache& cache, const NewKeys& added,
                                   const KVCacheOptions& options) {
  using Signature =
      at::Tensor(at::Tensor&, at::Tensor&, TensorRef, TensorRef, TensorRef, TensorRef, TensorRef,
                 bool, bool, TensorRef, OptionalRef, OptionalRef, OptionalRef, bool);
  static const auto op = find_op<Signature>("flashtile::append_kv_rotary");
  const bool q_fixed =
      !options.causal && options.window_size == std::pair<int64_t, int64_t>(-1, -1);
  at::Tensor k = cache.k, v = cache.v;
  // NOLINTBEGIN(bugprone-unchecked-optional-access)
  return op.call(k, v, added.k, added.v, q, *added.rotary_cos, *added.rotary_sin,
                 added.rotary_interleaved, q_fixed, *cache.seqlens, cache.batch_idx,
                 cache.block_table, options.cu_seqlens_q, options.check);
  // NOLINTEND(bugprone-unchecked-optional-access)
}

// An op that takes tensors, and then how to read the cache.
template <class Result, class... Tensors>
Result read_with(const char* name, const KVCache& cache, const KVCacheOptions& options,
                 Tensors&... tensors) {
  using Signature = Result(Tensors & ..., std::optional<double>, c10::SymInt, c10::SymInt,
                           c10::SymInt, c10::SymInt, c10::SymInt, OptionalRef, OptionalRef,
                           OptionalRef, OptionalRef, OptionalRef, OptionalRef, bool, int64_t);
  static const auto op = find_op<Signature>(name);
  const bool appended = options.append.has_value(), packed = options.cu_seqlens_q.has_value();
  const int64_t seqlen_new = appended && !packed ? options.append->k.size(1) : 0;
  return op.call(tensors..., options.softmax_scale, options.window_size.first,
                 options.causal ? 0 : options.window_size.second, seqlen_new, options.num_splits,
                 options.max_seqlen_q, options.cu_seqlens_q,
                 appended ? options.cu_seqlens_q : std::nullopt, cache.seqlens, cache.batch_idx,
                 cache.leftpad, cache.block_table, options.check,
                 static_cast<int64_t>(options.causal_alignment));
}

inline Forward read_kvcache(TensorRef q, const KVCache& cache, const KVCacheOptions& options) {
  if (!options.out.has_value()) {
    return read_with<Forward>("flashtile::forward_kvcache", cache, options, q, cache.k, cache.v);
  }
  at::Tensor out = *options.out;
  at::Tensor lse = read_with<at::Tensor>("flashtile::forward_kvcache_out", cache, options, q,
                                         cache.k, cache.v, out);
  return {out, lse};
}

// Appends, if there is something to append, and attends.
inline Forward append_and_read(TensorRef q, const KVCache& cache, const KVCacheOptions& options) {
  at::Tensor queries = q;
  if (options.append.has_value()) {
    const NewKeys& added = *options.append;
    raise_unless(cache.seqlens.has_value(),
                 "cache.seqlens is unset; allowed: a tensor, which says where append.k belongs");
    raise_unless(added.rotary_cos.has_value() == added.rotary_sin.has_value(),
                 "one of rotary_cos and rotary_sin is unset; allowed: both or neither");
    if (added.rotary_cos.has_value()) {
      queries = append_kv_rotary(q, cache, added, options);
    } else {
      append_kv(cache, added, options);
    }
  }
  return read_kvcache(queries, cache, options);
}

// The node of a result over a cache: whoever goes backward through it hears that it has no
// gradient.
struct CacheFunction : torch::autograd::Function<CacheFunction> {
  static Gradients forward(AutogradContext*, const Forward& result, TensorRef, TensorRef, TensorRef,
                           OptionalRef, OptionalRef) {
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

// The same for everything that goes with a cache; the options by value, as they are changed.
inline Forward attend_cast(TensorRef q, const KVCache& cache, KVCacheOptions options) {
  if (options.append.has_value()) {
    NewKeys& added = *options.append;
    added.k = autocast_like(added.k, cache.k);
    added.v = autocast_like(added.v, cache.v);
    for (std::optional<at::Tensor>* table : {&added.rotary_cos, &added.rotary_sin}) {
      if (table->has_value()) *table = autocast_like(**table, cache.k);
    }
  }
  return append_and_read(autocast_like(q, cache.k), cache, options);
}

// What is written must not need a gradient. Returns whether anything that is read wants one.
inline bool check_gradients(TensorRef q, const KVCache& cache, const KVCacheOptions& options) {
  if (!at::GradMode::is_enabled()) return false;
  const Named k = {"cache.k", &cache.k}, v = {"cache.v", &cache.v};
  bool wanted = q.requires_grad() || cache.k.requires_grad() || cache.v.requires_grad();
  if (options.out.has_value())
    refuse_gradients("out is a tensor", "out", {{"q", &q}, k, v, {"out", &*options.out}});
  if (!options.append.has_value()) return wanted;
  const at::Tensor &k_new = options.append->k, &v_new = options.append->v;
  refuse_gradients("append is set", "the cache", {k, v});
  if (options.out.has_value())
    refuse_gradients("out is a tensor", "out", {{"append.k", &k_new}, {"append.v", &v_new}});
  return wanted || k_new.requires_grad() || v_new.requires_grad();
}

}  // namespace detail

// Attention of new queries over a cache, into which options.append is written first, in place. q is
// (batch, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens_q,
// which serves prefill and decoding in one call. A new row that has no place in the cache is an
// error on the CPU, before anything is written; on CUDA it is not written. The bits of a sequence's
// result depend on num_splits and on the sequence alone. Without gradients: tensors may require
// grad, but going backward throws. Under autocast q, new rows and tables take the cache's dtype.
inline AttentionResult attention_with_kvcache(const at::Tensor& q, const KVCache& cache,
                                              const KVCacheOptions& options = {}) {
  detail::refuse_tangents({&q, &cache.k, &cache.v});
  if (options.append.has_value()) detail::refuse_tangents({&options.append->k, &options.append->v});
  const bool differentiable = detail::check_gradients(q, cache, options);
  const auto attend = [&] {
    const at::NoGradGuard guard;
    return detail::is_autocast(cache.k) ? detail::attend_cast(q, cache, options)
                                        : detail::append_and_read(q, cache, options);
  };
  auto [out, lse] = attend();
  if (differentiable) {
    const auto& added = options.append;
    const detail::Gradients both =
        detail::CacheFunction::apply(detail::Forward{out, lse}, q, cache.k, cache.v,
                                     added.has_value() ? std::optional(added->k) : std::nullopt,
                                     added.has_value() ? std::optional(added->v) : std::nullopt);
    out = both[0];
    lse = both[1];
  }
  return {out, options.return_lse ? lse : at::Tensor()};
}

// Throws what a call with `check` has found on a CUDA device since the last look. Does not wait:
// synchronise the stream before, to hear of everything that was enqueued.
inline void raise_pending_checks() {
  static const auto op = detail::find_op<void()>("flashtile::raise_pending_checks");
  op.call();
}

}  // namespace flashtile
