// The arguments of the cache's ops as structs, the checks on their tensors, and the way to the
// structs of the C API.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace flashtile::ops {

using OptionalTensor = std::optional<Tensor>;

// Where the sequences' rows are. k_cache (num_pages, page_size, num_heads_kv, head_dim), v_cache
// the same with head_dim_v.
struct CacheArguments {
  Tensor k_cache, v_cache;
  OptionalTensor cache_seqlens;                 // [batch]
  OptionalTensor cache_batch_idx;               // [batch]
  OptionalTensor block_table;                   // [batch, max_blocks]
  OptionalTensor cache_leftpad = std::nullopt;  // [batch]
  OptionalTensor cu_seqlens_new = std::nullopt;
};

inline int64_t batch_of(const Tensor& tensor, const OptionalTensor& cu_seqlens) {
  return cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : tensor.size(0);
}

// Everything that attention over a cache reads, and how.
struct ReadArguments {
  Tensor q;
  CacheArguments cache;
  OptionalTensor cu_seqlens_q;
  std::optional<double> softmax_scale;
  int64_t window_left, window_right;
  int64_t seqlen_new;  // dense: new rows of every sequence, which the cache holds by now
  int64_t num_splits;
  int64_t max_seqlen_q;
  bool check;
  int64_t alignment;
  OptionalTensor out = std::nullopt;  // written; unset: a new tensor

  bool is_packed() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return batch_of(q, cu_seqlens_q); }
  std::vector<int64_t> out_sizes() const {
    std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
    sizes.back() = cache.v_cache.size(3);
    return sizes;
  }
  std::vector<int64_t> lse_sizes() const {
    if (is_packed()) return {q.size(1), q.size(0)};
    return {q.size(0), q.size(2), q.size(1)};
  }
};

// What is written, and how.
struct Rotation {
  Tensor q, cos, sin;
  bool interleaved, q_fixed;
};
struct AppendArguments {
  Tensor k, v;
  CacheArguments cache;  // with cu_seqlens_new k and v are packed, and so is q
  bool check;
  std::optional<Rotation> rotation = std::nullopt;

  const Tensor& like() const { return rotation.has_value() ? rotation->q : k; }
  int64_t batch() const { return batch_of(like(), cache.cu_seqlens_new); }
};

// One sentence that names the argument, what it was and what is allowed; empty when all is well.
std::string refusal(const ReadArguments& args);
std::string refusal(const AppendArguments& args);

flashtile_problem to_problem(const ReadArguments& args);
flashtile_problem to_problem(const AppendArguments& args);

// Where out, the LSE and the rotated q go is not said. The problem must outlive the params.
flashtile_forward_params to_params(const ReadArguments& args, const flashtile_problem& problem);
flashtile_append_kv_params to_params(const AppendArguments& args, const flashtile_problem& problem);

}  // namespace flashtile::ops
