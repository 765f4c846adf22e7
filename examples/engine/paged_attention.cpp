#include "paged_attention.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace engine {
namespace {

void check(flashtile_status status) {
  if (status == FLASHTILE_OK) return;
  throw std::runtime_error(std::string(flashtile_status_string(status)) + ": " +
                           flashtile_last_error());
}

int64_t element_size(flashtile_dtype dtype) { return dtype == FLASHTILE_FLOAT32 ? 4 : 2; }

}  // namespace

PagedAttention::PagedAttention(const AttentionShape& shape, const StepLayout& layout)
    : shape_(shape) {
  flashtile_problem_init(&problem_);
  problem_.device = shape.device;
  problem_.dtype = problem_.dtype_kv = problem_.dtype_out = shape.dtype;
  problem_.batch = layout.batch;
  problem_.num_heads = shape.num_heads;
  problem_.num_heads_kv = shape.num_heads_kv;
  problem_.head_dim = shape.head_dim;
  problem_.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  problem_.window_right = 0;  // causal: the last query of a sequence sees its last key

  // Queries of all sequences, one behind the other; the new keys lie beside them.
  problem_.cu_seqlens_q = problem_.cu_seqlens_new = layout.cu_seqlens;
  problem_.total_q = problem_.total_new = layout.total_tokens;
  problem_.seqlen_q = layout.longest_slice;

  problem_.page_size = shape.page_size;
  problem_.num_pages = shape.num_pages;
  problem_.block_table = layout.block_table;
  problem_.block_table_stride = problem_.max_blocks = layout.max_blocks;
  problem_.seqused_k = layout.rows_before;
  problem_.seqlen_k = layout.longest_sequence;
}

size_t PagedAttention::workspace_bytes() const {
  const flashtile_forward_params params = forward_params({});
  size_t bytes = 0;
  check(flashtile_workspace_size(&params, &bytes));
  return bytes;
}

void PagedAttention::run(const LayerTensors& layer, void* workspace, size_t workspace_bytes) const {
  const flashtile_append_kv_params append = append_params(layer);
  check(flashtile_append_kv(&append, /*stream=*/nullptr));
  flashtile_forward_params forward = forward_params(layer);
  forward.workspace = workspace;
  forward.workspace_bytes = workspace_bytes;
  check(flashtile_forward(&forward, /*stream=*/nullptr));
}

flashtile_forward_params PagedAttention::forward_params(const LayerTensors& layer) const {
  const int64_t dim = shape_.head_dim, row = (shape_.num_heads + 2 * shape_.num_heads_kv) * dim;
  const int64_t cache_row = shape_.num_heads_kv * dim, page = shape_.page_size * cache_row;
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem_;
  params.q = {layer.qkv, 0, row, dim};
  params.k = {layer.k_cache, page, cache_row, dim};
  params.v = {layer.v_cache, page, cache_row, dim};
  params.out = {layer.out, 0, shape_.num_heads * dim, dim};
  return params;
}

flashtile_append_kv_params PagedAttention::append_params(const LayerTensors& layer) const {
  const flashtile_forward_params forward = forward_params(layer);
  const int64_t head_bytes = shape_.head_dim * element_size(shape_.dtype);
  char* const k_new = static_cast<char*>(layer.qkv) + shape_.num_heads * head_bytes;
  char* const v_new = k_new + shape_.num_heads_kv * head_bytes;
  flashtile_append_kv_params params;
  flashtile_append_kv_init(&params);
  params.problem = &problem_;
  params.k_cache = forward.k;
  params.v_cache = forward.v;
  params.q = params.q_out = params.k_new = params.v_new = forward.q;  // strides of a row of qkv
  params.k_new.data = k_new;
  params.v_new.data = v_new;
  params.rotary_cos = shape_.rotary_cos;
  params.rotary_sin = shape_.rotary_sin;
  params.rotary_stride = shape_.head_dim / 2;
  params.rotary_rows = shape_.rotary_rows;
  params.rotary_dim = shape_.head_dim;
  params.rotary_flags = FLASHTILE_ROTARY_HALVES;
  return params;
}

}  // namespace engine
