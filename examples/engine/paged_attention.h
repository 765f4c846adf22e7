// Attention of one step over the paged cache, through flashtile's C interface alone: what an engine
// without torch would write too.
#pragma once

#include <flashtile/flashtile.h>

#include <cstddef>
#include <cstdint>

namespace engine {

// The part that is the same in every step. Layers share it: each has its own cache of this shape.
struct AttentionShape {
  flashtile_device device = FLASHTILE_CPU;
  flashtile_dtype dtype = FLASHTILE_FLOAT32;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  // Row p belongs to position p: [rotary_rows, head_dim / 2], dtype, on `device`; halves are
  // paired.
  const void* rotary_cos = nullptr;
  const void* rotary_sin = nullptr;
  int64_t rotary_rows = 0;
};

// The sequences of a step. The pointers point to `device`; they are read when the work runs there,
// and so must live until then.
struct StepLayout {
  int64_t batch = 0;
  int64_t total_tokens = 0;              // of all sequences
  int64_t longest_slice = 0;             // tokens of one sequence in this step, at most
  int64_t longest_sequence = 0;          // its rows in the cache after the step, at most
  int64_t max_blocks = 0;                // columns of block_table
  const int32_t* cu_seqlens = nullptr;   // [batch + 1]
  const int32_t* rows_before = nullptr;  // [batch], rows in the cache before this step
  const int32_t* block_table = nullptr;  // [batch, max_blocks]
};

// q, k and v of a layer lie side by side in one row of the projection's result:
// [total_tokens, num_heads + 2 * num_heads_kv, head_dim]. q is rotated in place.
struct LayerTensors {
  void* qkv = nullptr;
  void* k_cache = nullptr;  // [num_pages, page_size, num_heads_kv, head_dim]
  void* v_cache = nullptr;
  void* out = nullptr;  // [total_tokens, num_heads, head_dim]
};

// One step. Not copied: the calls point to `problem`.
class PagedAttention {
 public:
  PagedAttention(const AttentionShape& shape, const StepLayout& layout);
  PagedAttention(const PagedAttention&) = delete;
  PagedAttention& operator=(const PagedAttention&) = delete;

  // Bytes that run() needs, the same for every layer; nothing is read or launched.
  size_t workspace_bytes() const;

  // Appends the step's keys and values, rotated, and lets its queries attend to everything before
  // them. On CUDA both are launched on the default stream. Throws std::runtime_error with
  // flashtile's sentence.
  void run(const LayerTensors& layer, void* workspace, size_t workspace_bytes) const;

 private:
  flashtile_forward_params forward_params(const LayerTensors& layer) const;
  flashtile_append_kv_params append_params(const LayerTensors& layer) const;

  AttentionShape shape_;
  flashtile_problem problem_;
};

}  // namespace engine
