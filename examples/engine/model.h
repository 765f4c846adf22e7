// A Llama-type model: embedding, layers of attention and SwiGLU, logits. The linear algebra is
// torch's, attention is flashtile's. Torch stays behind this header.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint.h"

namespace engine {

struct ModelOptions {
  std::filesystem::path folder;
  std::string device = "auto";  // cpu, cuda, or auto: cuda if there is one
  std::string dtype = "auto";   // float32, bfloat16, float16, or auto: float32 on the CPU
  int64_t num_pages = 256;
  int64_t page_size = 16;
};

// The tokens of a step, those of a sequence one behind the other.
struct Batch {
  std::vector<int32_t> tokens;         // [total]
  std::vector<int32_t> cu_seqlens{0};  // [sequences + 1]
  std::vector<int32_t> rows_before;    // [sequences], rows of each in the cache
  std::vector<int32_t> block_table;    // [sequences, max_blocks]
  int64_t max_blocks = 0;
  std::vector<int32_t> logit_rows;  // tokens of which the logits are wanted
};

// [rows, vocab_size], fp32
struct Logits {
  std::vector<float> values;
  int64_t vocab_size = 0;
};

class Model {
 public:
  explicit Model(const ModelOptions& options);
  ~Model();

  const ModelConfig& config() const;
  std::string device() const;
  std::string dtype() const;
  int64_t cache_bytes() const;

  // The cache's page `to` becomes equal to page `from`, in all layers.
  void copy_page(int32_t from, int32_t to);
  // Writes the batch into the cache. Logits of batch.logit_rows, in their order.
  Logits forward(const Batch& batch);

 private:
  struct Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace engine
