// The part of flashtile/torch.h that says how to attend: the structs that calls take, and the order
// in which the ops take their members.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <optional>
#include <string>
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
  // Between q k^T and v, in the order that flashtile.h gives (flashtile_scores). Any strides; a
  // dimension of one entry is repeated; gradients of alibi_slopes, bias, bias2 and sink.
  double softcap = 0;                                     // c tanh(x / c); 0: none
  std::optional<at::Tensor> alibi_slopes = std::nullopt;  // (num_heads) or (batch, num_heads), fp32
  // (batch|1, num_heads|1, seqlen_q|1, seqlen_k|1); of packed sequences (num_heads|1, max_q, max_k)
  // by the position in the sequence, with or without the batch in front; fp16, bf16 or fp32
  std::optional<at::Tensor> bias = std::nullopt;
  std::optional<at::Tensor> bias2 = std::nullopt;
  std::optional<at::Tensor> mask = std::nullopt;  // bool, shaped like a bias; true: the key is seen
  // (num_heads), (batch, num_heads), (batch, num_heads, seqlen_q), packed (1, num_heads, total_q)
  std::optional<at::Tensor> sink = std::nullopt;
  double dropout_p = 0;                                // the probability to drop; below 2^-32: none
  std::optional<at::Tensor> rng_state = std::nullopt;  // (2), int64: seed and offset; unset: drawn
  // (batch, seqlen_q), packed (total_q), fp32
  std::optional<at::Tensor> query_scale = std::nullopt;
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

// Rows that attention_with_kvcache writes into the cache, behind those in use, before it reads.
struct NewKeys {
  at::Tensor k, v;  // (batch, seqlen_new, num_heads_kv, head_dim); (total_q, ...) with packed q
  // Both or neither: (seqlen_rotary, rotary_dim / 2); q and k are rotated by their position.
  std::optional<at::Tensor> rotary_cos = std::nullopt;
  std::optional<at::Tensor> rotary_sin = std::nullopt;
  bool rotary_interleaved = true;  // pairs (2 d, 2 d + 1); else (d, d + rotary_dim / 2)
};

// A key/value cache, and what a call appends to it. New members are added at the end.
//
// k and v are (batch_cache, seqlen_cache, num_heads_kv, head_dim), where sequence b owns entry
// cache_batch_idx[b] (unset: b), or with block_table pages, (num_pages, page_size, ...): row j of
// sequence b is row j % page_size of page block_table[b][j / page_size]. All numbers are int32 on
// the cache's device; none is waited for, and none, however wrong, makes a call touch memory
// outside the tensors.
struct KVCache {
  at::Tensor k, v;
  // Earlier names of the members with cache_ in front; set one of the two.
  std::optional<at::Tensor> seqlens = std::nullopt;
  std::optional<at::Tensor> batch_idx = std::nullopt;
  std::optional<at::Tensor> leftpad = std::nullopt;
  std::optional<at::Tensor> block_table = std::nullopt;      // (batch, max_blocks)
  std::optional<at::Tensor> cache_seqlens = std::nullopt;    // (batch): rows in use; unset: all
  std::optional<at::Tensor> cache_batch_idx = std::nullopt;  // (batch)
  std::optional<at::Tensor> cache_leftpad = std::nullopt;    // (batch): first rows, unused
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
  // As in AttentionOptions. The keys of bias, bias2 and mask are the rows of the cache, left
  // padding counted, as many as the longest sequence has.
  double softcap = 0;
  std::optional<at::Tensor> alibi_slopes = std::nullopt;
  std::optional<at::Tensor> bias = std::nullopt;
  std::optional<at::Tensor> bias2 = std::nullopt;
  std::optional<at::Tensor> mask = std::nullopt;
  std::optional<at::Tensor> sink = std::nullopt;
  std::optional<at::Tensor> query_scale = std::nullopt;
};

struct AttentionResult {
  at::Tensor out;          // shaped like q, with head_dim_v; contiguous if new; in the dtype of q
  at::Tensor softmax_lse;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q), fp32, for
                           // fp64 inputs fp64; undefined unless return_lse
};

// What can_run answers.
struct CanRun {
  bool ok;
  // Not ok: the sentence that the call would throw. Ok: empty or, on a GPU of compute capability
  // 9.0, why the kernels for sm_80 run: "k.stride_seq is 516; ...".
  std::string why;
};

namespace detail {

using torch::jit::Stack;

// The options that every op takes, in the order of its schema, from either struct.
template <class Options>
void push_options(Stack& stack, const Options& options) {
  bool deterministic = false;
  if constexpr (requires { options.deterministic; }) deterministic = options.deterministic;
  torch::jit::push(stack, options.softmax_scale, options.window_size.first,
                   options.causal ? 0 : options.window_size.second, deterministic,
                   static_cast<int64_t>(options.causal_alignment));
}

// What the ops of attention take behind the options; unset: dense.
inline void push_sequences(Stack& stack, const std::optional<Sequences>& sequences) {
  if (sequences.has_value()) {
    torch::jit::push(stack, sequences->max_seqlen_q, sequences->max_seqlen_k,
                     sequences->cu_seqlens_q, sequences->cu_seqlens_k, sequences->seqused_q,
                     sequences->seqused_k);
  } else {
    torch::jit::push(stack, 0, 0, c10::IValue(), c10::IValue(), c10::IValue(), c10::IValue());
  }
}

// What the ops that read a cache take behind the options. The rows that were appended are announced
// to them: cache_seqlens says what was in use before.
inline void push_cache(Stack& stack, const KVCache& cache, const KVCacheOptions& options) {
  const bool is_packed = options.cu_seqlens_q.has_value(), appended = options.append.has_value();
  int64_t rows_new = 0;
  if (appended && options.append->k.dim() > 1) rows_new = options.append->k.size(is_packed ? 0 : 1);
  torch::jit::push(stack, options.num_splits, options.max_seqlen_q, options.cu_seqlens_q, rows_new,
                   appended ? options.cu_seqlens_q : std::nullopt, cache.cache_seqlens,
                   cache.cache_batch_idx, cache.cache_leftpad, cache.block_table, options.check);
}

// What the ops that attend take last, from either struct: there is no dropout over a cache.
template <class Options>
void push_scores(Stack& stack, const Options& options) {
  torch::jit::push(stack, options.softcap, options.alibi_slopes, options.bias, options.bias2,
                   options.mask, options.sink);
  if constexpr (requires { options.dropout_p; }) {
    torch::jit::push(stack, options.dropout_p, options.rng_state, options.query_scale);
  } else {
    torch::jit::push(stack, 0.0, c10::IValue(), options.query_scale);
  }
}

// What the ops that append take last; cache_seqlens is set.
inline void push_places(Stack& stack, const KVCache& cache, const KVCacheOptions& options) {
  torch::jit::push(stack, cache.cache_seqlens, cache.cache_batch_idx, cache.block_table,
                   options.cu_seqlens_q, options.check);
}

}  // namespace detail

}  // namespace flashtile
