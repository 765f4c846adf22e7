// A Llama-type checkpoint: config.json and model.safetensors of one folder, as export_model.py
// writes them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace engine {

struct ModelConfig {
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_seqlen = 0;  // positions that the model was trained for
  double rope_theta = 0;
  double rms_norm_eps = 0;
  bool tie_word_embeddings = false;  // the embedding is the output matrix too
};

// Throws std::runtime_error with a sentence when a value is missing or cannot be served.
ModelConfig read_config(const std::filesystem::path& folder);

// Where a tensor lies in the file.
struct StoredTensor {
  std::string dtype;  // as safetensors names it: "F32", "BF16", "F16"
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // in bytes
  uint64_t size = 0;
};

// An open safetensors file. Throws std::runtime_error with a sentence that names the file.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& file);

  // Throws unless there is a tensor of this name and shape.
  const StoredTensor& find(const std::string& name, const std::vector<int64_t>& shape) const;
  // Reads tensor.size bytes.
  void read(const StoredTensor& tensor, void* to) const;

 private:
  void read_header();
  void read_bytes(uint64_t begin, uint64_t size, void* to) const;

  std::filesystem::path file_;
  mutable std::ifstream stream_;
  std::map<std::string, StoredTensor> tensors_;
};

}  // namespace engine
