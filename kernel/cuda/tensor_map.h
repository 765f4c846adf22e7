// Tensor maps: what the tensor memory accelerator (TMA) has to know of a tensor in global memory.
//
// A map here sees the rows of a (batch, seqlen, heads, head_dim) tensor twice over, so that a copy
// can end at any row, as packed sequences and unused rows need it:
//
//   dimension   0         1          2               3      4
//   extent      head_dim  box rows   rows + box rows  heads  batch
//   stride      1         row        row              head   batch
//
// Rows [r, r + n) of a box, n <= box rows, are the coordinates (box rows - n, r + n) of a map that
// begins `box rows` rows before the tensor: whatever follows row r + n - 1 lies outside of
// dimension
// 1. Loads leave zeros there and stores nothing; neither touches the memory behind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"
#include "ptx/tensor_map.h"
#include "status.h"

namespace flashtile {

// A tensor argument and how far its strides run.
struct MappedTensor {
  const char* name;  // "q"
  View view;
  int64_t head_dim, rows, heads, batch;
};
inline MappedTensor query_tensor(const char* name, const View& view, const Problem& p,
                                 int64_t head_dim) {
  return {name, view, head_dim, p.rows_q(), p.num_heads, p.is_varlen() ? 1 : p.batch};
}
inline MappedTensor key_tensor(const char* name, const View& view, const Problem& p,
                               int64_t head_dim) {
  const int64_t batch = p.cache.exists() ? p.cache.num_pages : p.is_varlen() ? 1 : p.batch;
  return {name, view, head_dim, p.rows_k(), p.num_heads_kv, batch};
}

// Why TMA cannot move this: what has which value, and what TMA takes. An empty text when it can.
struct TmaObstacle {
  char text[96] = "";
  const char* takes = "multiples of 16 bytes and distinct rows";
  explicit operator bool() const { return text[0] != '\0'; }
};
TmaObstacle tma_obstacle(const MappedTensor& tensor);
// The same of a cache's pages.
TmaObstacle page_obstacle(const Cache& cache);

// A page is loaded in boxes of rows that TMA's swizzle permutes alike.
inline constexpr int kPageBoxRows = 8;

// Whether the driver has cuTensorMapEncodeTiled.
bool driver_encodes_tensor_maps();

// Fills `map` for boxes of 64 columns and `box_rows` rows, in the 128-byte swizzle of
// tile/smem_tile.cuh (WideTile). tma_obstacle() has found none.
[[nodiscard]] Status encode_tensor_map(const MappedTensor& tensor, int box_rows, TensorMap& map);

struct TensorMapOf {
  MappedTensor tensor;
  int box_rows;
  TensorMap& map;
};
template <size_t kCount>
[[nodiscard]] Status encode_tensor_maps(const TensorMapOf (&maps)[kCount]) {
  for (const auto& [tensor, box_rows, map] : maps) {
    if (Status s = encode_tensor_map(tensor, box_rows, map)) return s;
  }
  return FLASHTILE_OK;
}

}  // namespace flashtile
