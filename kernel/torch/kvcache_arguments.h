// The arguments of the cache's ops as structs, the checks on their tensors, and the way to the
// structs of the C API.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "cache_checks.h"
#include "options.h"
#include "scores.h"

namespace flashtile::ops {

// Where the sequences' rows are. k_cache (num_pages, page_size, num_heads_kv, head_dim), v_cache
// the same with head_dim_v. Both and the new rows have the dtype of q or, under float32, 16 bits.
struct CacheArguments {
  Tensor k_cache, v_cache;
  OptionalTensor cache_seqlens = std::nullopt;    // [batch]: rows in use before any new ones
  OptionalTensor cache_batch_idx = std::nullopt;  // [batch]
  OptionalTensor cache_leftpad = std::nullopt;    // [batch]
  OptionalTensor block_table = std::nullopt;      // [batch, max_blocks]
};

// The rows that an append writes. The attention after it is told of them, too: cache_seqlens are
// those before the append, and the core adds these.
struct NewRows {
  int64_t rows = 0;                          // of every sequence; with offsets: of all together
  OptionalTensor cu_seqlens = std::nullopt;  // [batch + 1]: the rows are packed

  bool is_packed() const { return cu_seqlens.has_value(); }
};

// Everything that attention over a cache reads, and how.
struct ReadArguments {
  Tensor q;
  CacheArguments cache;
  OptionalTensor out = std::nullopt;  // written; unset: a new tensor
  Options options = {};
  int64_t num_splits = 0;
  int64_t max_seqlen_q = 0;
  OptionalTensor cu_seqlens_q = std::nullopt;  // [batch + 1]: q is packed
  NewRows added = {};
  bool check = false;
  ScoreOptions scores = {};

  template <class Visit>
  void visit(const Visit& member) {
    options.visit(member);
    member("SymInt num_splits=0", num_splits);
    member("SymInt max_seqlen_q=0", max_seqlen_q);
    member("Tensor? cu_seqlens_q=None", cu_seqlens_q);
    member("SymInt rows_new=0", added.rows);
    member("Tensor? cu_seqlens_new=None", added.cu_seqlens);
    member("Tensor? cache_seqlens=None", cache.cache_seqlens);
    member("Tensor? cache_batch_idx=None", cache.cache_batch_idx);
    member("Tensor? cache_leftpad=None", cache.cache_leftpad);
    member("Tensor? block_table=None", cache.block_table);
    member("bool check=False", check);
    scores.visit(member);
  }
  const Tensor& keys() const { return cache.k_cache; }
  const Tensor& values() const { return cache.v_cache; }
  OpNames names() const { return kCacheNames; }
  bool is_packed() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return is_packed() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
};

// What is written, and how.
struct Rotation {
  Tensor q, cos, sin;
  bool interleaved, q_fixed;
};
struct AppendArguments {
  CacheArguments cache;
  Tensor k, v;
  std::optional<Rotation> rotation = std::nullopt;
  OptionalTensor cu_seqlens_new = std::nullopt;  // [batch + 1]: k and v are packed, and so is q
  bool check = false;

  template <class Visit>
  void visit(const Visit& member) {
    member("Tensor? cache_seqlens", cache.cache_seqlens);
    member("Tensor? cache_batch_idx", cache.cache_batch_idx);
    member("Tensor? block_table", cache.block_table);
    member("Tensor? cu_seqlens_new", cu_seqlens_new);
    member("bool check=False", check);
  }
  const Tensor& like() const { return rotation.has_value() ? rotation->q : k; }
  bool is_packed() const { return cu_seqlens_new.has_value(); }
  int64_t batch() const { return is_packed() ? cu_seqlens_new->size(0) - 1 : like().size(0); }
  NewRows added() const { return {k.size(is_packed() ? 0 : 1), cu_seqlens_new}; }
};

// One sentence that names the argument, what it was and what is allowed; empty when all is well.
std::string refusal(const ReadArguments& args);
std::string refusal(const AppendArguments& args);

// `scores` is what the problem points to.
flashtile_problem to_problem(const ReadArguments& args, flashtile_scores& scores);
flashtile_problem to_problem(const AppendArguments& args);

// Where the rotated q goes is not said. The problem must outlive the params.
flashtile_append_kv_params to_params(const AppendArguments& args, const flashtile_problem& problem);

}  // namespace flashtile::ops
