#include "mask_band.h"

#include <algorithm>
#include <vector>

namespace ggml_flashtile {
namespace {

constexpr uint16_t kHidden = 0xfc00;  // -inf
constexpr int64_t kBlock = 64;

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  bool empty() const { return end <= begin; }
  bool operator==(const Range& other) const {
    return empty() ? other.empty() : begin == other.begin && end == other.end;
  }
};

// Without branches: compilers make vectors of them.
bool is_hidden(const uint16_t* entries, int64_t count) {
  uint16_t others = 0;
  for (int64_t j = 0; j < count; ++j) others |= entries[j] ^ kHidden;
  return others == 0;
}
bool is_zero(const uint16_t* entries, int64_t count) {
  uint16_t bits = 0;
  for (int64_t j = 0; j < count; ++j) bits |= entries[j];
  return (bits & 0x7fff) == 0;
}

// From the first key that the row shows to the last.
Range shown_keys(const uint16_t* row, int64_t keys) {
  Range shown{0, keys};
  while (shown.end - shown.begin >= kBlock && is_hidden(row + shown.begin, kBlock))
    shown.begin += kBlock;
  while (!shown.empty() && row[shown.begin] == kHidden) ++shown.begin;
  while (shown.end - shown.begin >= kBlock && is_hidden(row + shown.end - kBlock, kBlock))
    shown.end -= kBlock;
  while (!shown.empty() && row[shown.end - 1] == kHidden) --shown.end;
  return shown;
}

struct Rows {
  std::vector<Range> shown;  // of query i of plane p at p * num_queries + i
  bool all_zero = true;      // what is shown
};

Rows read_rows(const ggml_tensor* mask, int64_t num_queries, int64_t num_keys, int num_threads) {
  const int64_t count = mask->ne[3] * mask->ne[2] * num_queries;
  Rows rows{std::vector<Range>(count)};
  bool all_zero = true;
#pragma omp parallel for num_threads(num_threads) if (count * num_keys > 65536) \
    reduction(&& : all_zero)
  for (int64_t r = 0; r < count; ++r) {
    const int64_t plane = r / num_queries;
    const char* const line = static_cast<const char*>(mask->data) + r % num_queries * mask->nb[1] +
                             plane % mask->ne[2] * mask->nb[2] + plane / mask->ne[2] * mask->nb[3];
    const auto* const row = reinterpret_cast<const uint16_t*>(line);
    const Range shown = shown_keys(row, num_keys);
    all_zero = all_zero && is_zero(row + shown.begin, shown.end - shown.begin);
    rows.shown[r] = shown;
  }
  rows.all_zero = all_zero;
  return rows;
}

Range keys_of(const MaskBand& band, int64_t query) {
  const int64_t diagonal = band.key_begin + query;
  return {
      band.window_left < 0 ? band.key_begin : std::max(band.key_begin, diagonal - band.window_left),
      band.window_right < 0 ? band.key_end
                            : std::min(band.key_end, diagonal + band.window_right + 1)};
}

}  // namespace

MaskBand find_mask_band(const ggml_tensor* mask, int64_t num_queries, int64_t num_keys,
                        int num_threads) {
  if (mask == nullptr) return {0, num_keys, -1, -1, true};
  const Rows rows = read_rows(mask, num_queries, num_keys, num_threads);
  const auto count = static_cast<int64_t>(rows.shown.size());

  MaskBand band{num_keys, 0, 0, 0, false};
  for (const Range& shown : rows.shown) {
    if (shown.empty()) continue;
    band.key_begin = std::min(band.key_begin, shown.begin);
    band.key_end = std::max(band.key_end, shown.end);
  }
  if (band.key_end <= band.key_begin) return {0, 0, -1, -1, true};
  for (int64_t r = 0; r < count; ++r) {
    if (rows.shown[r].empty()) continue;
    const int64_t diagonal = band.key_begin + r % num_queries;
    band.window_left = std::max(band.window_left, diagonal - rows.shown[r].begin);
    band.window_right = std::max(band.window_right, rows.shown[r].end - 1 - diagonal);
  }
  if (band.window_left >= num_queries - 1) band.window_left = -1;
  if (band.window_right >= band.keys() - 1) band.window_right = -1;

  band.is_mask = rows.all_zero;
  for (int64_t r = 0; r < count && band.is_mask; ++r)
    band.is_mask = rows.shown[r] == keys_of(band, r % num_queries);
  return band;
}

}  // namespace ggml_flashtile
