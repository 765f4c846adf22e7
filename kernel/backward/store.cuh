// End of the backward's main kernel: dK and dV from registers to global memory, through shared
// memory so that every store is 16 bytes of a row. Where several warps hold partial sums of the
// same keys, the partner's half is added first, in fp32 and in a fixed order.
#pragma once

#include "backward/tile.cuh"
#include "tile/epilogue.cuh"

namespace flashtile {

// Every row's factor.
struct Scale {
  float value;
  FLASHTILE_DEVICE float operator()(int, int) const { return value; }
};

// Registers to shared memory and back, as they are: [register / 4][lane], 16 bytes each.
template <int kRows, int kCols>
FLASHTILE_DEVICE void put_registers(uint32_t address, const Accumulator<kRows, kCols>& x,
                                    int lane) {
  FLASHTILE_UNROLL
  for (int i = 0; i < kRows / 16 * (kCols / 8); ++i)
    ptx::sts_f32x4(address + (i * 32 + lane) * 16, x.d[i / (kCols / 8)][i % (kCols / 8)]);
}
template <int kRows, int kCols>
FLASHTILE_DEVICE void add_registers(Accumulator<kRows, kCols>& x, uint32_t address, int lane) {
  FLASHTILE_UNROLL
  for (int i = 0; i < kRows / 16 * (kCols / 8); ++i) {
    const float4 y = ptx::lds_f32x4(address + (i * 32 + lane) * 16);
    float (&d)[4] = x.d[i / (kCols / 8)][i % (kCols / 8)];
    d[0] += y.x;
    d[1] += y.y;
    d[2] += y.z;
    d[3] += y.w;
  }
}

// The rows of a tile that the sequence owns: zeros where they are not in use.
template <class Copy, class Tile>
FLASHTILE_DEVICE void store_rows(const View& view, const RowFormat& format, const RowBlock& block,
                                 uint32_t tile, int thread) {
  const Sequence& s = block.sequence;
  const uint32_t source = tile + Copy::offset(thread);
  const int bytes = format.bytes - Copy::chunk(thread) * kChunkBytes;
  char* target = Copy::source(view, s, s.row_k + block.row0, block.head, thread);
  FLASHTILE_UNROLL
  for (int i = 0; i < Copy::kPasses; ++i) {
    const int row = Copy::row(thread) + i * Copy::kRowsPerPass;
    if (row >= block.owned) break;
    FLASHTILE_UNROLL
    for (int c = 0; c < Copy::kChunks; ++c) {
      uint4 x = ptx::lds_u32x4(source + i * Copy::kRowsPerPass * Tile::kPanelRowBytes +
                               c * Tile::kPanelBytes);
      if (row >= block.rows) x = make_uint4(0, 0, 0, 0);
      store_chunk(target + c * Tile::kPanelRowBytes, x, bytes - c * Tile::kPanelRowBytes,
                  format.unit);
    }
    target += 2 * Copy::kRowsPerPass * view.stride_seq;
  }
}

template <class T, class Smem, class Gradient>
FLASHTILE_DEVICE void store_gradients(const BackwardLaunch& launch, int index, uint32_t smem,
                                      Gradient& dk, Gradient& dv) {
  using Tile = typename Smem::KeyTile;
  constexpr BackwardConfig kConfig = Smem::kConfig;
  constexpr bool kPartialSums = kConfig.warps_q > 1 && !kConfig.split_head_dim;
  constexpr int kKeys = Gradient::kRows;
  static_assert(2 * Tile::kBytes <= Smem::kBytes);
  using Copy = RowCopy<Tile, 32 * kConfig.warps()>;
  // Found again here, so that nothing of it was kept in registers during the main loop.
  const BackwardParams& p = launch.params;
  const RowBlock block =
      row_block<Side::kKeys, kConfig.block_k, kConfig.block_q>(p.problem, launch.slots_k, index);
  const int thread = ptx::thread_index();
  const int lane = thread % 32, warp = thread / 32;
  const int warp_key = warp / kConfig.warps_q, warp_query = warp % kConfig.warps_q;
  const uint32_t dk_tile = smem, dv_tile = smem + Tile::kBytes;
  const Scale scale = {p.problem.softmax_scale};

  __syncthreads();  // all warps are done with the tiles of the main loop
  if constexpr (kPartialSums) {
    static_assert(kConfig.warps_q == 2);
    constexpr int kWarpBytes = kKeys * Tile::kCols * 4;
    static_assert(kConfig.warps() * kWarpBytes <= Smem::kBytes);
    const uint32_t own = smem + warp * kWarpBytes, other = smem + (warp ^ 1) * kWarpBytes;
    if (warp_query == 0) {
      put_registers(own, dv, lane);
    } else {
      put_registers(own, dk, lane);
    }
    __syncthreads();  // the partial sums are in shared memory
    if (warp_query == 0) {
      add_registers(dk, other, lane);
    } else {
      add_registers(dv, other, lane);
    }
    __syncthreads();  // they have been read
    if (warp_query == 0) {
      store_shared<T, Tile>(dk_tile, warp_key * kKeys, lane, dk, scale);
    } else {
      store_shared<T, Tile>(dv_tile, warp_key * kKeys, lane, dv, Scale{1.0f});
    }
  } else {
    constexpr int kParts = kConfig.split_head_dim ? kConfig.warps_q : 1;
    const int part = kConfig.split_head_dim ? warp_query : 0;
    store_shared<T, Tile, kParts>(dk_tile, warp_key * kKeys, lane, dk, scale, part);
    store_shared<T, Tile, kParts>(dv_tile, warp_key * kKeys, lane, dv, Scale{1.0f}, part);
  }
  __syncthreads();  // dK and dV of the block are complete
  store_rows<Copy, Tile>(p.dk, launch.dk, block, dk_tile, thread);
  store_rows<Copy, Tile>(p.dv, launch.dv, block, dv_tile, thread);
}

}  // namespace flashtile
