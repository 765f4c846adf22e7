// Planted bugs: results that a backend with such a mistake would give, so that we know how many
// cases the fuzzer needs to find one. Each shows in some cases only.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../compare.h"

namespace flashtile::test {

struct Plant {
  const char* name;
  // Changes what the truth is computed from, so that sound results look as wrong as the mistake
  // would make them. Returns whether this case shows the mistake.
  std::function<void(const Setup&, AttentionInput&)> change;
};

inline const std::vector<Plant>& plants() {
  static const std::vector<Plant> all = {
      {"window-one-key-short",
       [](const Setup&, AttentionInput& input) {
         if (input.mask.left > 0) --input.mask.left;
       }},
      {"top-left-taken-for-bottom-right",
       [](const Setup&, AttentionInput& input) { input.mask.top_left = false; }},
      {"last-key-after-a-whole-block-lost",
       [](const Setup&, AttentionInput& input) {
         // Only full masks: there the key that is lost moves no diagonal.
         const bool full = input.mask.left == -1 && input.mask.right == -1;
         for (Span& span : input.sequences) span.seqlen_k -= full && span.seqlen_k % 64 == 1;
       }},
      {"dlse-forgotten-in-varlen",
       [](const Setup& setup, AttentionInput& input) {
         if (setup.spec.is_varlen()) input.dlse.clear();
       }},
      {"wrong-key-head-in-groups-of-three",
       [](const Setup&, AttentionInput& input) {
         if (input.heads != 3 * input.heads_kv || input.heads_kv == 1) return;
         const auto swap_heads = [&](std::vector<double>& tensor, int dim) {
           const auto row = static_cast<size_t>(input.heads_kv) * static_cast<size_t>(dim);
           for (size_t first = 0; first + row <= tensor.size(); first += row) {
             for (size_t d = 0; d < static_cast<size_t>(dim); ++d)
               std::swap(tensor[first + d], tensor[first + row - static_cast<size_t>(dim) + d]);
           }
         };
         swap_heads(input.k, input.head_dim);
         swap_heads(input.v, input.head_dim_v);
       }},
  };
  return all;
}

}  // namespace flashtile::test
