#include "flash_attn_ext.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "mask_band.h"

namespace ggml_flashtile {
namespace {

// The node's tensors: q (head_dim, queries, heads, sequences), k and v alike with their own heads,
// an fp16 mask (keys, queries, 1 or heads, 1 or sequences) and sinks (heads), or null.
struct Node {
  explicit Node(const ggml_tensor* node)
      : q(node->src[0]),
        k(node->src[1]),
        v(node->src[2]),
        mask(node->src[3]),
        sinks(node->src[4]),
        out(node) {
    float numbers[3];
    std::memcpy(numbers, node->op_params, sizeof numbers);
    scale = numbers[0];
    max_bias = numbers[1];
    softcap = numbers[2];
  }

  int64_t queries() const { return q->ne[1]; }
  int64_t keys() const { return k->ne[1]; }
  int64_t heads() const { return q->ne[2]; }
  int64_t heads_kv() const { return k->ne[2]; }
  int64_t sequences() const { return q->ne[3]; }
  int64_t group() const { return heads() / heads_kv(); }

  const ggml_tensor *q, *k, *v, *mask, *sinks, *out;
  float scale, max_bias, softcap;
};

std::optional<flashtile_dtype> dtype_of(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F16: return FLASHTILE_FLOAT16;
    case GGML_TYPE_BF16: return FLASHTILE_BFLOAT16;
    case GGML_TYPE_F32: return FLASHTILE_FLOAT32;
    default: return std::nullopt;
  }
}

int64_t stride(const ggml_tensor* tensor, int dim) {
  return static_cast<int64_t>(tensor->nb[dim] / ggml_type_size(tensor->type));
}

// A dimension of a mask that has one entry for all has stride 0.
int64_t broadcast_stride(const ggml_tensor* tensor, int dim) {
  return tensor->ne[dim] == 1 ? 0 : stride(tensor, dim);
}

bool has_dense_rows(const ggml_tensor* tensor) {
  const size_t size = ggml_type_size(tensor->type);
  return tensor->nb[0] == size && tensor->nb[1] % size == 0 && tensor->nb[2] % size == 0 &&
         tensor->nb[3] % size == 0;
}

char* data_at(const ggml_tensor* tensor, int64_t row, int64_t head) {
  return static_cast<char*>(tensor->data) + row * tensor->nb[1] + head * tensor->nb[2];
}

std::string type_sentence(const char* name, const ggml_tensor* tensor, const char* allowed) {
  return std::string(name) + " is " + ggml_type_name(tensor->type) + "; allowed: " + allowed;
}

std::string why_not_types(const Node& node) {
  if (node.q->type != GGML_TYPE_F32) return type_sentence("q", node.q, "f32");
  if (!dtype_of(node.k->type)) return type_sentence("k", node.k, "f16, bf16 and f32");
  if (node.v->type != node.k->type)
    return type_sentence("v", node.v, ggml_type_name(node.k->type)) + ", the type of k";
  if (node.mask != nullptr && node.mask->type != GGML_TYPE_F16)
    return type_sentence("the mask", node.mask, "f16");
  if (node.sinks != nullptr && node.sinks->type != GGML_TYPE_F32)
    return type_sentence("sinks", node.sinks, "f32");
  return {};
}

std::string why_not_shapes(const Node& node) {
  for (const ggml_tensor* tensor : {node.q, node.k, node.v}) {
    if (!has_dense_rows(tensor)) return "the rows of q, k or v are not dense";
    if (tensor->ne[3] != node.sequences()) return "k and v have other sequences than q";
  }
  if (node.v->ne[2] != node.heads_kv() || node.v->ne[1] != node.keys())
    return "v has other heads or keys than k";
  if (node.heads() % node.heads_kv() != 0) return "the heads of k do not divide those of q";
  if (node.mask == nullptr) return node.max_bias > 0 ? "ALiBi has no mask" : "";
  if (!has_dense_rows(node.mask) || node.mask->ne[0] < node.keys() ||
      node.mask->ne[1] < node.queries())
    return "the mask is smaller than queries and keys, or its rows are not dense";
  if (node.mask->ne[2] != 1 && node.mask->ne[2] != node.heads())
    return "the mask has neither one head nor those of q";
  if (node.mask->ne[3] != 1 && node.mask->ne[3] != node.sequences())
    return "the mask has neither one sequence nor those of q";
  return {};
}

flashtile_problem problem_of(const Node& node) {
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.dtype = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.dtype_kv = *dtype_of(node.k->type);
  problem.batch = node.sequences();
  problem.num_heads = node.heads();
  problem.num_heads_kv = node.heads_kv();
  problem.head_dim = node.q->ne[0];
  problem.head_dim_v = node.v->ne[0];
  problem.seqlen_q = node.queries();
  problem.seqlen_k = node.keys();
  problem.softmax_scale = node.scale;
  if (node.scale == 0) problem.flags |= FLASHTILE_ZERO_SCALE;
  problem.alignment = FLASHTILE_TOP_LEFT;
  return problem;
}

// What a head's mask is multiplied by: with ALiBi ggml's geometric sequence, which begins anew
// behind the last power of two.
float mask_factor(const Node& node, int64_t head) {
  if (node.max_bias <= 0) return 1;
  const int64_t power = int64_t{1} << static_cast<int>(std::log2(node.heads()));
  if (head < power)
    return std::pow(std::exp2(-node.max_bias / power), static_cast<float>(head + 1));
  return std::pow(std::exp2(-node.max_bias / 2 / power),
                  static_cast<float>(2 * (head - power) + 1));
}

// Query heads [begin, end), whole groups of a key/value head.
struct Heads {
  int64_t begin;
  int64_t end;
  int64_t count() const { return end - begin; }
};

// The mask where the band shows it, as flashtile reads it where it lies.
flashtile_score_tensor bias_of(const Node& node, const MaskBand& band) {
  flashtile_score_tensor bias{};
  bias.data = static_cast<ggml_fp16_t*>(node.mask->data) + band.key_begin;
  bias.stride_batch = broadcast_stride(node.mask, 3);
  bias.stride_head = broadcast_stride(node.mask, 2);
  bias.stride_q = stride(node.mask, 1);
  bias.stride_k = 1;
  bias.dtype = FLASHTILE_FLOAT16;
  return bias;
}

// The same times the factor of each head, (sequences, heads, queries, keys) of fp32: flashtile has
// no factor on a bias. In fp32 the products are those of ggml.
flashtile_score_tensor scaled_bias_of(const Node& node, const MaskBand& band, Heads heads,
                                      int num_threads, Scratch& scratch) {
  const ggml_tensor* const mask = node.mask;
  const int64_t keys = band.keys(), rows = heads.count() * node.queries();
  auto* const numbers =
      static_cast<float*>(scratch.reserve(mask->ne[3] * rows * keys * sizeof(float)));
#pragma omp parallel for num_threads(num_threads) if (rows * keys > 32768)
  for (int64_t r = 0; r < mask->ne[3] * rows; ++r) {
    const int64_t query = r % node.queries();
    const int64_t head = heads.begin + r / node.queries() % heads.count();
    const char* const line = data_at(mask, query, head % mask->ne[2]) + r / rows * mask->nb[3];
    float* const to = numbers + r * keys;
    ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t*>(line) + band.key_begin, to, keys);
    const float factor = mask_factor(node, head);
    for (int64_t j = 0; j < keys; ++j) to[j] *= factor;
  }
  flashtile_score_tensor bias{};
  bias.data = numbers;
  bias.stride_batch = mask->ne[3] == 1 ? 0 : rows * keys;
  bias.stride_head = node.queries() * keys;
  bias.stride_q = keys;
  bias.stride_k = 1;
  bias.dtype = FLASHTILE_FLOAT32;
  return bias;
}

flashtile_score_tensor sink_of(const Node& node, Heads heads) {
  flashtile_score_tensor sink{};
  if (node.sinks == nullptr) return sink;
  sink.data = static_cast<float*>(node.sinks->data) + heads.begin;
  sink.stride_head = 1;
  sink.dtype = FLASHTILE_FLOAT32;
  return sink;
}

// The part of a call that has these heads.
void point_to(const Node& node, const MaskBand& band, Heads heads,
              flashtile_forward_params* params) {
  const int64_t head_kv = heads.begin / node.group();
  params->q = {data_at(node.q, 0, heads.begin), stride(node.q, 3), stride(node.q, 1),
               stride(node.q, 2)};
  params->k = {data_at(node.k, band.key_begin, head_kv), stride(node.k, 3), stride(node.k, 1),
               stride(node.k, 2)};
  params->v = {data_at(node.v, band.key_begin, head_kv), stride(node.v, 3), stride(node.v, 1),
               stride(node.v, 2)};
  // out is (head_dim_v, heads, queries, sequences).
  params->out = {data_at(node.out, heads.begin, 0), stride(node.out, 3), stride(node.out, 2),
                 stride(node.out, 1)};
}

// How many heads have their scaled masks in memory at a time.
int64_t heads_at_once(const Node& node, const MaskBand& band) {
  constexpr int64_t kMost = int64_t{64} << 20;  // bytes
  const int64_t of_group = std::max<int64_t>(
      node.mask->ne[3] * node.group() * node.queries() * band.keys() * sizeof(float), 1);
  return std::clamp<int64_t>(kMost / of_group, 1, node.heads_kv()) * node.group();
}

}  // namespace

std::string why_not(const ggml_tensor* tensor) {
  const Node node(tensor);
  if (std::string why = why_not_types(node); !why.empty()) return why;
  if (std::string why = why_not_shapes(node); !why.empty()) return why;
  flashtile_problem problem = problem_of(node);
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  scores.softcap = node.softcap;
  problem.scores = &scores;
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  size_t bytes = 0;
  return flashtile_workspace_size(&params, &bytes) == FLASHTILE_OK ? "" : flashtile_last_error();
}

flashtile_status FlashAttention::compute(const ggml_tensor* tensor, int num_threads) {
  const Node node(tensor);
  const MaskBand band = find_mask_band(node.mask, node.queries(), node.keys(), num_threads);
  const bool scales_mask = node.max_bias > 0 && !band.is_mask;
  const int64_t step = scales_mask ? heads_at_once(node, band) : node.heads();

  flashtile_problem problem = problem_of(node);
  problem.seqlen_k = band.keys();
  problem.window_left = band.window_left;
  problem.window_right = band.window_right;
  problem.num_threads = num_threads;
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  scores.softcap = node.softcap;
  problem.scores = &scores;
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  for (Heads heads{0, 0}; heads.end < node.heads();) {
    heads = {heads.end, std::min(heads.end + step, node.heads())};
    problem.num_heads = heads.count();
    problem.num_heads_kv = heads.count() / node.group();
    point_to(node, band, heads, &params);
    scores.sink = sink_of(node, heads);
    if (scales_mask) {
      scores.bias[0] = scaled_bias_of(node, band, heads, num_threads, bias_);
    } else if (!band.is_mask) {
      scores.bias[0] = bias_of(node, band);
    }
    flashtile_status status = flashtile_workspace_size(&params, &params.workspace_bytes);
    if (status == FLASHTILE_OK) {
      params.workspace = workspace_.reserve(params.workspace_bytes);
      status = flashtile_forward(&params, nullptr);
    }
    if (status != FLASHTILE_OK) return status;
  }
  ++counts.computed;
  if (!band.is_mask) ++counts.with_bias;
  return FLASHTILE_OK;
}

}  // namespace ggml_flashtile
