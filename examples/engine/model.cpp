#include "model.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <stdexcept>

#include "paged_attention.h"

namespace engine {
namespace {

struct Layer {
  at::Tensor attention_norm, mlp_norm;  // [hidden]
  at::Tensor qkv;                       // [(num_heads + 2 num_heads_kv) * head_dim, hidden]
  at::Tensor output;                    // [hidden, num_heads * head_dim]
  at::Tensor gate_up;                   // [2 * intermediate, hidden]
  at::Tensor down;                      // [hidden, intermediate]
};

at::Device choose_device(const std::string& name) {
  if (name == "cpu" || (name == "auto" && !at::hasCUDA())) return at::kCPU;
  if (name == "cuda" || name == "auto") return at::Device(at::kCUDA, 0);
  throw std::runtime_error("device is " + name + "; allowed: auto, cpu, cuda");
}

at::ScalarType choose_dtype(const std::string& name, const at::Device& device) {
  if (name == "auto") return device.is_cuda() ? at::kBFloat16 : at::kFloat;
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw std::runtime_error("dtype is " + name + "; allowed: auto, float32, bfloat16, float16");
}

const char* name_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return "bfloat16";
  return dtype == at::kHalf ? "float16" : "float32";
}

flashtile_dtype as_flashtile(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return FLASHTILE_BFLOAT16;
  return dtype == at::kHalf ? FLASHTILE_FLOAT16 : FLASHTILE_FLOAT32;
}

// Weights of a checkpoint as tensors of a device and dtype.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const at::TensorOptions& options)
      : checkpoint_(checkpoint), options_(options) {}

  at::Tensor operator()(const std::string& name, const std::vector<int64_t>& shape) const {
    const StoredTensor& stored = checkpoint_.find(name, shape);
    const at::ScalarType dtype = stored.dtype == "F32"    ? at::kFloat
                                 : stored.dtype == "BF16" ? at::kBFloat16
                                                          : at::kHalf;
    const at::Tensor tensor = at::empty(shape, at::TensorOptions(dtype));
    checkpoint_.read(stored, tensor.data_ptr());
    return tensor.to(options_.device(), options_.dtype().toScalarType());
  }

 private:
  const Checkpoint& checkpoint_;
  at::TensorOptions options_;
};

Layer load_layer(const Loader& load, const ModelConfig& config, int64_t index) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const int64_t hidden = config.hidden_size, wide = config.intermediate_size;
  const int64_t q = config.num_heads * config.head_dim, kv = config.num_heads_kv * config.head_dim;
  return {
      .attention_norm = load(prefix + "input_layernorm.weight", {hidden}),
      .mlp_norm = load(prefix + "post_attention_layernorm.weight", {hidden}),
      .qkv = at::cat({load(prefix + "self_attn.q_proj.weight", {q, hidden}),
                      load(prefix + "self_attn.k_proj.weight", {kv, hidden}),
                      load(prefix + "self_attn.v_proj.weight", {kv, hidden})}),
      .output = load(prefix + "self_attn.o_proj.weight", {hidden, q}),
      .gate_up = at::cat({load(prefix + "mlp.gate_proj.weight", {wide, hidden}),
                          load(prefix + "mlp.up_proj.weight", {wide, hidden})}),
      .down = load(prefix + "mlp.down_proj.weight", {hidden, wide}),
  };
}

at::Tensor on_device(const std::vector<int32_t>& values, const at::Device& device) {
  // Copied also on the CPU: the tensor lives longer than the values where the device is behind.
  const at::Tensor view = at::from_blob(const_cast<int32_t*>(values.data()),
                                        {static_cast<int64_t>(values.size())}, at::kInt);
  return device.is_cpu() ? view.clone() : view.to(device);
}

}  // namespace

struct Model::Implementation {
  ModelConfig config;
  at::TensorOptions options;  // device and dtype
  at::Tensor embedding;       // [vocab, hidden]
  at::Tensor output;          // [vocab, hidden]
  at::Tensor final_norm;      // [hidden]
  std::vector<Layer> layers;
  at::Tensor cache;      // [layers, k and v, pages, page_size, num_heads_kv, head_dim]
  at::Tensor cos, sin;   // [max_seqlen, head_dim / 2]
  at::Tensor workspace;  // bytes; grows, and is the same for all layers
  AttentionShape shape;

  explicit Implementation(const ModelOptions& from);
  void load(const std::filesystem::path& folder);
  void make_cache();
  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const {
    return at::rms_norm(x, {config.hidden_size}, weight, config.rms_norm_eps);
  }
  void grow_workspace(size_t bytes);
  at::Tensor attend(const at::Tensor& x, size_t index, const PagedAttention& attention);
  static at::Tensor feed_forward(const at::Tensor& x, const Layer& layer);
};

Model::Implementation::Implementation(const ModelOptions& from) : config(read_config(from.folder)) {
  const at::Device device = choose_device(from.device);
  options = at::TensorOptions(device).dtype(choose_dtype(from.dtype, device));
  shape = {.device = device.is_cuda() ? FLASHTILE_CUDA : FLASHTILE_CPU,
           .dtype = as_flashtile(options.dtype().toScalarType()),
           .num_heads = config.num_heads,
           .num_heads_kv = config.num_heads_kv,
           .head_dim = config.head_dim,
           .num_pages = from.num_pages,
           .page_size = from.page_size};
  // What flashtile does not serve is refused before a gigabyte is read.
  PagedAttention(shape, {.batch = 1}).workspace_bytes();
  load(from.folder);
  make_cache();
}

void Model::Implementation::load(const std::filesystem::path& folder) {
  const Checkpoint checkpoint(folder / "model.safetensors");
  const Loader load(checkpoint, options);
  const std::vector<int64_t> table = {config.vocab_size, config.hidden_size};
  embedding = load("model.embed_tokens.weight", table);
  output = config.tie_word_embeddings ? embedding : load("lm_head.weight", table);
  final_norm = load("model.norm.weight", {config.hidden_size});
  for (int64_t i = 0; i < config.num_layers; ++i) layers.push_back(load_layer(load, config, i));
}

void Model::Implementation::make_cache() {
  cache = at::zeros({config.num_layers, 2, shape.num_pages, shape.page_size, config.num_heads_kv,
                     config.head_dim},
                    options);
  // Angles in fp32, then rounded: as the model was trained.
  const at::Tensor exponent = at::arange(0, config.head_dim, 2, at::kFloat).div_(config.head_dim);
  const at::Tensor frequency = at::pow(config.rope_theta, exponent).reciprocal_();
  const at::Tensor angle = at::outer(at::arange(config.max_seqlen, at::kFloat), frequency);
  cos = angle.cos().to(options.device(), options.dtype().toScalarType());
  sin = angle.sin().to(options.device(), options.dtype().toScalarType());
  shape.rotary_cos = cos.data_ptr();
  shape.rotary_sin = sin.data_ptr();
  shape.rotary_rows = config.max_seqlen;
}

void Model::Implementation::grow_workspace(size_t bytes) {
  if (workspace.defined() && workspace.nbytes() >= bytes) return;
  // Torch allocates on 64 bytes at least, which is what flashtile asks for.
  workspace = at::empty({static_cast<int64_t>(bytes)}, options.dtype(at::kByte));
}

at::Tensor Model::Implementation::attend(const at::Tensor& x, size_t index,
                                         const PagedAttention& attention) {
  const Layer& layer = layers[index];
  const at::Tensor qkv = at::linear(norm(x, layer.attention_norm), layer.qkv);
  const at::Tensor out = at::empty({x.size(0), config.num_heads * config.head_dim}, options);
  const at::Tensor kv = cache[static_cast<int64_t>(index)];
  attention.run({.qkv = qkv.data_ptr(),
                 .k_cache = kv[0].data_ptr(),
                 .v_cache = kv[1].data_ptr(),
                 .out = out.data_ptr()},
                workspace.data_ptr(), workspace.nbytes());
  return at::linear(out, layer.output);
}

at::Tensor Model::Implementation::feed_forward(const at::Tensor& x, const Layer& layer) {
  const std::vector<at::Tensor> halves = at::linear(x, layer.gate_up).chunk(2, -1);
  return at::linear(at::silu(halves[0]).mul_(halves[1]), layer.down);
}

Model::Model(const ModelOptions& options) {
  const c10::InferenceMode inference;
  implementation_ = std::make_unique<Implementation>(options);
}
Model::~Model() = default;

const ModelConfig& Model::config() const { return implementation_->config; }
std::string Model::device() const { return implementation_->options.device().str(); }
std::string Model::dtype() const {
  return name_of(implementation_->options.dtype().toScalarType());
}
int64_t Model::cache_bytes() const { return static_cast<int64_t>(implementation_->cache.nbytes()); }

void Model::copy_page(int32_t from, int32_t to) {
  const c10::InferenceMode inference;
  const at::Tensor& cache = implementation_->cache;
  cache.select(2, to).copy_(cache.select(2, from));
}

Logits Model::forward(const Batch& batch) {
  const c10::InferenceMode inference;
  Implementation& model = *implementation_;
  const at::Device device = model.options.device();
  const at::Tensor cu_seqlens = on_device(batch.cu_seqlens, device);
  const at::Tensor rows_before = on_device(batch.rows_before, device);
  const at::Tensor block_table = on_device(batch.block_table, device);

  StepLayout layout;
  layout.batch = static_cast<int64_t>(batch.rows_before.size());
  layout.total_tokens = static_cast<int64_t>(batch.tokens.size());
  for (int64_t b = 0; b < layout.batch; ++b) {
    const int64_t count = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
    layout.longest_slice = std::max(layout.longest_slice, count);
    layout.longest_sequence = std::max(layout.longest_sequence, batch.rows_before[b] + count);
  }
  layout.max_blocks = batch.max_blocks;
  layout.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  layout.rows_before = rows_before.const_data_ptr<int32_t>();
  layout.block_table = block_table.const_data_ptr<int32_t>();
  const PagedAttention attention(model.shape, layout);
  model.grow_workspace(attention.workspace_bytes());

  at::Tensor x = at::embedding(model.embedding, on_device(batch.tokens, device));
  for (size_t i = 0; i < model.layers.size(); ++i) {
    x.add_(model.attend(x, i, attention));
    const Layer& layer = model.layers[i];
    x.add_(Implementation::feed_forward(model.norm(x, layer.mlp_norm), layer));
  }
  x = model.norm(x.index_select(0, on_device(batch.logit_rows, device)), model.final_norm);
  const at::Tensor logits = at::linear(x, model.output).to(at::kCPU, at::kFloat).contiguous();
  const float* const values = logits.const_data_ptr<float>();
  return {{values, values + logits.numel()}, model.config.vocab_size};
}

}  // namespace engine
