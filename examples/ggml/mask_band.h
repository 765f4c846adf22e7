// What a mask of ggml shows, as a window that flashtile skips tiles by.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace ggml_flashtile {

// Keys [key_begin, key_end) are those that some query sees. Query i sees at most the keys
// key_begin + i - window_left to key_begin + i + window_right; -1 is no bound.
struct MaskBand {
  int64_t key_begin;
  int64_t key_end;
  int64_t window_left;
  int64_t window_right;
  bool is_mask;  // the mask is 0 in the band and -inf elsewhere: the band says all of it

  int64_t keys() const { return key_end - key_begin; }
};

// The narrowest band around what a mask (keys, queries, heads, sequences) of fp16 shows to the
// first num_queries; without a mask, all of it.
MaskBand find_mask_band(const ggml_tensor* mask, int64_t num_queries, int64_t num_keys,
                        int num_threads);

}  // namespace ggml_flashtile
