// Planted bugs: results that a backend with such a mistake would give, so that we know how many
// cases the fuzzer needs to find one. Each shows in some cases only.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "../support/cache_case.h"
#include "../support/compare.h"

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

struct CachePlant {
  const char* name;
  std::function<void(const CacheSpec&, AttentionInput&)> change;
};

inline const std::vector<CachePlant>& cache_plants() {
  static const std::vector<CachePlant> all = {
      {"appended-rows-not-counted",
       [](const CacheSpec& spec, AttentionInput& input) {
         for (size_t b = 0; b < spec.sequences.size(); ++b)
           input.sequences[b].seqlen_k = spec.sequences[b].keys;
       }},
      {"last-row-of-a-full-page-lost",
       [](const CacheSpec& spec, AttentionInput& input) {
         const bool full = input.mask.left == -1 && input.mask.right == -1;
         for (size_t b = 0; full && spec.page_size > 1 && b < spec.sequences.size(); ++b) {
           const int rows = spec.rows_of(spec.sequences[b]);
           input.sequences[b].seqlen_k -=
               input.sequences[b].seqlen_k > 0 && rows % spec.page_size == 0;
         }
       }},
      {"first-page-of-the-first-sequence-for-all",
       [](const CacheSpec& spec, AttentionInput& input) {
         const auto copy_rows = [&](std::vector<double>& tensor, int dim) {
           const int64_t row = int64_t{input.heads_kv} * dim;
           for (const Span& span : input.sequences) {
             const int64_t count =
                 std::min<int64_t>({spec.page_size, span.seqlen_k, input.sequences[0].seqlen_k});
             std::copy_n(tensor.begin(), count * row, tensor.begin() + span.row_k * row);
           }
         };
         copy_rows(input.k, input.head_dim);
         copy_rows(input.v, input.head_dim_v);
       }},
      {"left-padding-moves-a-window",
       [](const CacheSpec& spec, AttentionInput& input) {
         int most = 0;
         for (const CacheSequence& s : spec.sequences) most = std::max(most, s.leftpad);
         if (input.mask.left > most) input.mask.left -= most;
       }},
  };
  return all;
}

}  // namespace flashtile::test
