#include "checkpoint.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

namespace engine {
namespace {

using Json = nlohmann::json;

[[noreturn]] void fail(const std::filesystem::path& file, const std::string& what) {
  throw std::runtime_error(file.string() + ": " + what);
}

int64_t size_of(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {{"F32", 4}, {"F16", 2}, {"BF16", 2}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

// The bytes that a tensor of this shape has; -1 when a size is negative or they cannot be counted.
int64_t bytes_of(const StoredTensor& tensor) {
  int64_t bytes = size_of(tensor.dtype);
  for (const int64_t size : tensor.shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return -1;
  }
  return bytes;
}

std::string show(const std::vector<int64_t>& shape) { return Json(shape).dump(); }

// What a config.json of another origin may ask for and the engine does not compute.
void refuse_other_models(const std::filesystem::path& file, const Json& json) {
  const std::pair<const char*, Json> all[] = {{"hidden_act", "silu"},
                                              {"attention_bias", false},
                                              {"mlp_bias", false},
                                              {"rope_scaling", nullptr}};
  for (const auto& [name, allowed] : all) {
    if (json.contains(name) && json[name] != allowed)
      fail(file, std::string(name) + " is " + json[name].dump() + "; allowed: " + allowed.dump());
  }
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "config.json";
  std::ifstream stream(file);
  if (!stream) fail(file, "cannot be read");
  try {
    const Json json = Json::parse(stream);
    ModelConfig config;
    json.at("num_hidden_layers").get_to(config.num_layers);
    json.at("hidden_size").get_to(config.hidden_size);
    json.at("intermediate_size").get_to(config.intermediate_size);
    json.at("num_attention_heads").get_to(config.num_heads);
    json.at("num_key_value_heads").get_to(config.num_heads_kv);
    json.at("head_dim").get_to(config.head_dim);
    json.at("vocab_size").get_to(config.vocab_size);
    json.at("max_position_embeddings").get_to(config.max_seqlen);
    json.at("rope_theta").get_to(config.rope_theta);
    json.at("rms_norm_eps").get_to(config.rms_norm_eps);
    json.at("tie_word_embeddings").get_to(config.tie_word_embeddings);
    const auto type = json.at("model_type").get<std::string>();
    if (type != "llama") fail(file, "model_type is " + type + "; allowed: llama");
    refuse_other_models(file, json);
    if (!(config.rope_theta > 0.0)) {
      fail(file, "rope_theta is " + Json(config.rope_theta).dump() + "; allowed: above 0");
    }
    for (const int64_t size : {config.num_layers, config.hidden_size, config.vocab_size,
                               config.num_heads, config.head_dim, config.max_seqlen}) {
      if (size < 1) fail(file, "a size is " + std::to_string(size) + "; allowed: 1 and more");
    }
    return config;
  } catch (const Json::exception& error) {
    fail(file, error.what());
  }
}

Checkpoint::Checkpoint(const std::filesystem::path& file)
    : file_(file), stream_(file, std::ios::binary) {
  if (!stream_) fail(file, "cannot be read");
  try {
    read_header();
  } catch (const Json::exception& error) {
    fail(file, error.what());
  }
}

// Eight bytes of length, that many of JSON, then the tensors. Nothing of the file is trusted.
void Checkpoint::read_header() {
  const uint64_t file_size = std::filesystem::file_size(file_);
  uint64_t length = 0;
  if (file_size < sizeof(length)) fail(file_, "too short for a safetensors file");
  read_bytes(0, sizeof(length), &length);
  if (length > file_size - sizeof(length)) fail(file_, "its header does not end");
  std::string text(length, ' ');
  read_bytes(sizeof(length), length, text.data());
  const uint64_t data = sizeof(length) + length;
  const Json header = Json::parse(text);
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto begin = entry.at("data_offsets").at(0).get<uint64_t>();
    const auto end = entry.at("data_offsets").at(1).get<uint64_t>();
    const StoredTensor tensor{entry.at("dtype"), entry.at("shape"), data + begin, end - begin};
    if (size_of(tensor.dtype) == 0) {
      fail(file_, name + " is of type " + tensor.dtype + "; allowed: F32, F16, BF16");
    }
    if (begin > end || end > file_size - data ||
        static_cast<int64_t>(tensor.size) != bytes_of(tensor)) {
      fail(file_, name + " lies outside of the file or has another size");
    }
    tensors_.emplace(name, tensor);
  }
}

void Checkpoint::read_bytes(uint64_t begin, uint64_t size, void* to) const {
  stream_.seekg(static_cast<std::streamoff>(begin));
  if (!stream_.read(static_cast<char*>(to), static_cast<std::streamsize>(size))) {
    fail(file_, "cannot be read at " + std::to_string(begin));
  }
}

void Checkpoint::read(const StoredTensor& tensor, void* to) const {
  read_bytes(tensor.begin, tensor.size, to);
}

const StoredTensor& Checkpoint::find(const std::string& name,
                                     const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail(file_, "no tensor " + name);
  if (found->second.shape != shape) {
    fail(file_, name + " has shape " + show(found->second.shape) + "; allowed: " + show(shape));
  }
  return found->second;
}

}  // namespace engine
