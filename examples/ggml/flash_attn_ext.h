// ggml's FLASH_ATTN_EXT through flashtile's C API.
#pragma once

#include <flashtile/flashtile.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "ggml.h"

namespace ggml_flashtile {

// Memory that grows and is kept, as aligned as the C API wants it.
class Scratch {
 public:
  // What it held is lost.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Delete> memory_;
  size_t size_ = 0;
};

// Why flashtile leaves the node to others; empty: it computes it. Reads no data: ggml asks before
// there is any.
std::string why_not(const ggml_tensor* node);

// Of this process: the nodes computed, and those of them whose mask a kernel read as a bias, since
// no window says what it shows.
struct Counts {
  std::atomic<uint64_t> computed{0};
  std::atomic<uint64_t> with_bias{0};
};
inline Counts counts;

// One after the other; memory is kept from node to node.
class FlashAttention {
 public:
  // Of what why_not() has nothing against. An error's sentence is flashtile_last_error().
  flashtile_status compute(const ggml_tensor* node, int num_threads);

 private:
  Scratch workspace_;
  Scratch bias_;
};

}  // namespace ggml_flashtile
