// What a row of a tensor looks like in memory, for the paths that do not take 16 whole bytes at a
// time: rows that end inside a tile (head_dim between two slices) and rows that are not 16-byte
// aligned (odd head_dim, views with an offset).
#pragma once

#include "../params.h"
#include "../ptx/ampere.cuh"

namespace flashtile {

struct RowFormat {
  int bytes;  // of a row: 2 * head_dim
  int unit;   // 16, 4 or 2 bytes: every row starts at a multiple of it and is a whole number of it
};

// What the strides of a tensor run over.
struct RowExtents {
  int64_t batch, rows, heads;
};
inline RowFormat row_format(const View& view, int64_t head_dim, const RowExtents& extents) {
  const auto used = [](int64_t stride, int64_t extent) { return extent <= 1 ? 0 : 2 * stride; };
  const uint64_t all = reinterpret_cast<uintptr_t>(view.data) |
                       static_cast<uint64_t>(used(view.stride_batch, extents.batch) |
                                             used(view.stride_seq, extents.rows) |
                                             used(view.stride_head, extents.heads) | 2 * head_dim);
  return {.bytes = static_cast<int>(2 * head_dim),
          .unit = all % 16 == 0  ? 16
                  : all % 4 == 0 ? 4
                                 : 2};
}
inline RowFormat query_format(const View& view, const Problem& p, int64_t head_dim) {
  return row_format(view, head_dim, {p.is_varlen() ? 1 : p.batch, p.rows_q(), p.num_heads});
}
inline RowFormat key_format(const View& view, const Problem& p, int64_t head_dim) {
  const int64_t batch = p.cache.exists() ? p.cache.num_pages : p.is_varlen() ? 1 : p.batch;
  return row_format(view, head_dim, {batch, p.rows_k(), p.num_heads_kv});
}

// Whether rows fill a tile of `cols` columns and can be moved 16 bytes at a time.
FLASHTILE_HOST_DEVICE bool fills_tile(const RowFormat& format, int cols) {
  return format.unit == 16 && format.bytes == 2 * cols;
}

// The first `bytes` (any number; at most 16 count) of a chunk, element by element; zeros follow.
FLASHTILE_DEVICE uint4 load_elements(const char* global, int bytes) {
  const auto* const elements = reinterpret_cast<const uint16_t*>(global);
  uint32_t pairs[4];
  FLASHTILE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 4 * i < bytes ? elements[2 * i] : 0u;
    const uint32_t high = 4 * i + 2 < bytes ? elements[2 * i + 1] : 0u;
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The first `bytes` of a chunk, a whole number of units; zeros follow.
FLASHTILE_DEVICE uint4 load_chunk(const char* global, int bytes, int unit) {
  if (unit != 16) return load_elements(global, bytes);
  return bytes > 0 ? *reinterpret_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
}

// One chunk to shared memory, in units of 4 bytes, asynchronously, or of 2; of it `bytes` exist, a
// whole number of units, at most 16 count.
FLASHTILE_DEVICE void copy_narrow(uint32_t shared, const char* global, int bytes, int unit) {
  if (unit == 2) {
    ptx::sts_u32x4(shared, load_elements(global, bytes));
    return;
  }
  FLASHTILE_UNROLL
  for (int i = 0; i < 16; i += 4) ptx::cp_async_4_or_zero(shared + i, global + i, i < bytes);
}

// One chunk to shared memory in units of 16 bytes, too.
FLASHTILE_DEVICE void copy_chunk(uint32_t shared, const char* global, int bytes, int unit) {
  if (unit == 16) {
    ptx::cp_async_16_or_zero(shared, global, bytes > 0);
  } else {
    copy_narrow(shared, global, bytes, unit);
  }
}

// The first `bytes` of a chunk to global memory.
FLASHTILE_DEVICE void store_chunk(char* global, const uint4& x, int bytes, int unit) {
  if (unit == 16) {
    if (bytes > 0) *reinterpret_cast<uint4*>(global) = x;
    return;
  }
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
  auto* const elements = reinterpret_cast<uint16_t*>(global);
  FLASHTILE_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (2 * i < bytes) elements[i] = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
  }
}

}  // namespace flashtile
