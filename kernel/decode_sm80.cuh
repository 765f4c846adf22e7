// Decoding over a key/value cache for compute capability 8.0 and later: few queries, many keys. One
// thread block computes one part of the keys of one tile of packed rows (decode_plan.cuh).
//
// The four warps share the keys, not the rows: of every step of 64 keys each warp loads its own 16
// rows of K and V, from whatever pages they are on, and waits for them alone. The loop has no
// barrier of the block; a ring of slots per warp keeps the copies going. P never leaves registers.
// After the last step the warps' sums are merged in a fixed order.
#pragma once

#include "config.cuh"
#include "decode_plan.cuh"
#include "decode_stream.cuh"
#include "launch.cuh"
#include "params.h"
#include "tile/load_sm80.cuh"
#include "tile/packed_edges.cuh"
#include "tile/product_sm80.cuh"
#include "tile/row_format.cuh"
#include "tile/softmax.cuh"

namespace flashtile {

template <int kHeadDim, Memory kMemory, class T>
struct DecodeSm80 {
  using Params = DecodeParams;
  static constexpr DecodeConfig kConfig = decode_config(kMemory, kHeadDim);
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kBlocksPerSm = kConfig.blocks_per_sm;
  static constexpr int kRows = kDecodeTile;
  static constexpr int kKeys = kDecodeStep / kDecodeWarps;  // of a warp
  static constexpr int kColBlocks = kHeadDim / 8;
  static_assert(kConfig.slots % 2 == 1);

  using QTile = SmemTile<kRows, kHeadDim>;
  using KvTile = SmemTile<kKeys, kHeadDim>;
  using Stream = DecodeStream<KvTile, kConfig.slots>;
  using Output = Accumulator<kRows, kHeadDim>;

  // Shared memory: the rings of the warps; the shifts of their softmax; their LogSums. Q passes
  // through the last slot of the last ring, the outputs that are merged through the first slots.
  static constexpr int kRings = kDecodeWarps * Stream::kRing;
  static constexpr int kOutputBytes = kRows * kHeadDim * sizeof(float);  // of a warp
  static constexpr int kVectorBytes = kDecodeWarps * kRows * sizeof(float);
  static constexpr int kSharedBytes = kRings + 3 * kVectorBytes;
  static_assert(QTile::kBytes <= KvTile::kBytes && kDecodeWarps * kOutputBytes <= kRings);
  static_assert(kBlocksPerSm * (kSharedBytes + 1024) <= shared_memory_limit(kMemory) + 1024);

  FLASHTILE_DEVICE static void run(const Params& params, char* shared) {
    const Problem& problem = params.forward.problem;
    const Parted parted = part_of_block(params);
    const DecodeTile& work = parted.tile;
    const BandMask mask(problem.band, work.sequence.seqlen_q, work.sequence.seqlen_k);
    const BlockRange range = work.steps(mask, params.plan.group);
    const DecodeParts parts(range.begin, range.end, problem.cache.num_splits);
    int part = parted.part;
    if (part >= parts.count) return;

    const uint32_t rings = ptx::shared_address(shared);
    Stream stream(params, work, mask, rings + warp() * Stream::kRing);
    order_q(params, work, rings);
    stream.begin(parts.first(part), parts.last(part));
    Rows rows(mask, work, range, params.plan.group, rings);
    receive_q(params, rings, rows.q);
    const int64_t partial =
        params.plan.partial(problem, work.first_row + work.row0, work.kv_head, 0);
    for (;;) {
      Sums sums(params.scale_log2, rings + kRings + warp() * kRows * sizeof(float));
      for (int step = parts.first(part); step < parts.last(part); ++step)
        attend(stream, rows, step, sums);
      finish(params, {partial + part, work.count()}, sums, rings);
      part += params.plan.part_blocks;
      if (part >= parts.count) return;
      __syncthreads();  // the outputs have been read, the rings are free
      stream.begin(parts.first(part), parts.last(part));
    }
  }

 private:
  struct Parted {
    DecodeTile tile;
    int part;  // the block's first one
  };

  // What is the same for all parts.
  struct Rows {
    RegisterOperand<QTile, kRows> q;
    LaneAddress<KvTile> k, v;  // in slot 0
    PackedEdges edges;
    BlockRange range;
    int first_key;  // of this warp, in a step

    FLASHTILE_DEVICE Rows(const BandMask& mask, const DecodeTile& work, const BlockRange& steps,
                          int group, uint32_t rings)
        : q(q_tile(rings), lane(), 0),
          k(rings + warp() * Stream::kRing, Lanes::kColsFirst, lane()),
          v(rings + warp() * Stream::kRing, Lanes::kRowsFirst, lane()),
          edges(mask, work.row0, work.rows, group, lane()),
          range(steps),
          first_key(warp() * kKeys) {}
  };

  // This warp's output, not yet divided by its sums.
  struct Sums {
    Output o;
    OnlineSoftmax<kRows> softmax;

    FLASHTILE_DEVICE Sums(float scale_log2, uint32_t shifts) : softmax(scale_log2, shifts) {
      clear(o);
    }
  };

  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE static int warp() { return ptx::thread_index() / 32; }

  // Neighbouring blocks read neighbouring heads of the same keys.
  FLASHTILE_DEVICE static Parted part_of_block(const Params& params) {
    const Problem& problem = params.forward.problem;
    const DecodePlan& plan = params.plan;
    const int heads = static_cast<int>(problem.num_heads_kv);
    const int index = ptx::block_index();
    const int slot = index / heads / plan.part_blocks;
    Parted parted;
    parted.part = index / heads % plan.part_blocks;
    DecodeTile& tile = parted.tile;
    tile.kv_head = index % heads;
    if (plan.tiles_per_sequence > 0) {
      tile.sequence = cache_sequence_of(problem, slot / plan.tiles_per_sequence);
      tile.row0 = slot % plan.tiles_per_sequence * kRows;
    } else {
      const int b = find_sequence(problem.cu_seqlens_q, static_cast<int>(problem.batch), slot,
                                  kRows, plan.group);
      tile.sequence = cache_sequence_of(problem, b);
      tile.row0 =
          static_cast<int>(slot - first_slot(tile.sequence.row_q * plan.group, b, kRows)) * kRows;
    }
    const bool served = tile.row0 >= 0 && plan.serves(tile.sequence.seqlen_q);
    tile.rows = served ? tile.sequence.seqlen_q * plan.group : 0;
    tile.first_row = decode_first_row(plan, tile.sequence);
    return parted;
  }

  // Where the results of the tile's packed rows go, of one part.
  struct Partials {
    int64_t first;
    int rows;
  };

  static FLASHTILE_DEVICE uint32_t q_tile(uint32_t rings) {
    return rings + kRings - KvTile::kBytes;
  }

  // The first two warps load Q, four threads a row.
  FLASHTILE_DEVICE static void order_q(const Params& params, const DecodeTile& work,
                                       uint32_t rings) {
    using Loader = TileLoader<QTile, 4 * kRows>;
    const int thread = ptx::thread_index();
    if (thread < 4 * kRows) {
      const typename Loader::Target target(q_tile(rings), thread);
      const View& q = params.forward.q;
      const int row = work.row0 + load_row<QTile>(thread);
      const int head = work.kv_head * params.plan.group + row % params.plan.group;
      const int64_t at = work.sequence.row_q + row / params.plan.group;
      const char* const source = row_address(q, work.sequence, at, head) + Loader::first_column();
      Loader::copy_row(target.at(0, 0), source,
                       row < work.rows ? params.q.bytes - Loader::first_column() : 0,
                       params.q.unit);
    }
    ptx::cp_async_commit();
  }

  // Returns when every warp has Q in its registers.
  FLASHTILE_DEVICE static void receive_q(const Params& params, uint32_t rings,
                                         RegisterOperand<QTile, kRows>& q) {
    ptx::cp_async_wait<2 * Stream::kAhead>();
    const int thread = ptx::thread_index();
    if (params.negate_q && thread < 4 * kRows)
      negate(LoadTarget<QTile, 4 * kRows>(q_tile(rings), thread));
    __syncthreads();  // Q has landed, and has its sign
    q.load();
    __syncthreads();  // everybody has read Q: its place is a slot
  }

  // One step: this warp's 16 keys.
  FLASHTILE_DEVICE static void attend(Stream& stream, const Rows& rows, int step, Sums& sums) {
    ptx::cp_async_wait<kConfig.slots - 2>();
    __syncwarp();  // K has landed; nobody in the warp reads the V before it any more
    stream.order_k();
    Accumulator<kRows, kKeys> s;
    mma_ABt<T>(s, rows.q, rows.k.behind(stream.take_slot()));
    if (rows.range.is_edge(step)) rows.edges.hide(s, step * kDecodeStep + rows.first_key);
    sums.softmax.raise_maximum(s, sums.o);
    sums.softmax.exponentiate(s, 0);
    uint32_t p[1][4];
    to_operand<T>(p[0], s, 0, 0);
    ptx::cp_async_wait<kConfig.slots - 2>();
    __syncwarp();  // V has landed; nobody in the warp reads K any more
    stream.order_v();
    mma_AB_step<T>(sums.o, p, rows.v.behind(stream.take_slot()), 0);
  }

  // Merges the warps' sums and writes the part's output and LogSums.
  FLASHTILE_DEVICE static void finish(const Params& params, const Partials& to, Sums& sums,
                                      uint32_t rings) {
    float sum[2];
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] = sums.softmax.row_sum(0, half);
      if (lane() % 4 == 0)
        store_log_sum(rings, warp(), half, sums.softmax.log_sum(0, half, sum[half]));
    }
    __syncthreads();  // the warps' LogSums are there; nobody reads a ring any more
    LogSum merged[2];
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float share = merge_rows(rings, half, params.scale_log2, merged[half]);
      scale_output(sums.o, half, sum[half], share);
    }
    const uint32_t outputs = rings + lane() * 16;
    FLASHTILE_UNROLL
    for (int n = 0; n < kColBlocks; ++n)
      ptx::sts_f32x4(outputs + warp() * kOutputBytes + n * 512, sums.o.d[0][n]);
    __syncthreads();  // the warps' outputs are there
    store_part(params, to, merged, outputs);
  }

  // This lane's rows lane / 4 and lane / 4 + 8.
  static FLASHTILE_DEVICE uint32_t log_sum_address(uint32_t rings, int warp, int half) {
    const int row = accumulator_row(lane(), 0, 2 * half);
    return rings + kRings + kVectorBytes + (warp * kRows + row) * sizeof(float);
  }
  FLASHTILE_DEVICE static void store_log_sum(uint32_t rings, int warp, int half, const LogSum& x) {
    const uint32_t address = log_sum_address(rings, warp, half);
    ptx::sts_f32(address, x.shift);
    ptx::sts_f32(address + kVectorBytes, x.near);
  }

  // The LogSum of a row over all warps, and what of the whole this warp's part is.
  FLASHTILE_DEVICE static float merge_rows(uint32_t rings, int half, float scale_log2,
                                           LogSum& merged) {
    LogSum all[kDecodeWarps], largest = log_sum_of_nothing();
    FLASHTILE_UNROLL
    for (int w = 0; w < kDecodeWarps; ++w) {
      const uint32_t address = log_sum_address(rings, w, half);
      all[w] = {ptx::lds_f32(address), ptx::lds_f32(address + kVectorBytes)};
      if (all[w].value(scale_log2) > largest.value(scale_log2)) largest = all[w];
    }
    float weights = 0.0f, own = 0.0f;
    FLASHTILE_UNROLL
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = all[w].weight(largest, scale_log2);
      weights += weight;
      if (w == warp()) own = weight;
    }
    merged = largest.times(weights);
    return own / weights;
  }

  // o / sum * share. A row that has seen no key is 0, also where a value that others see is NaN.
  FLASHTILE_DEVICE static void scale_output(Output& o, int half, float sum, float share) {
    const float factor = share / sum;
    FLASHTILE_UNROLL
    for (int n = 0; n < kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        o.d[0][n][i] = sum == 0.0f ? 0.0f : o.d[0][n][i] * factor;
    }
  }

  // Each warp adds up and writes every fourth block of 8 columns.
  FLASHTILE_DEVICE static void store_part(const Params& params, const Partials& to,
                                          const LogSum (&merged)[2], uint32_t outputs) {
    const Problem& problem = params.forward.problem;
    const DecodeWorkspace workspace(params.forward.workspace, params.plan.partials(problem),
                                    kHeadDim);
    float* out[2];
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = accumulator_row(lane(), 0, 2 * half);
      const int64_t partial = to.first + params.plan.partial(problem, row, 0, 0);
      out[half] = row < to.rows ? workspace.out + partial * kHeadDim : nullptr;
      if (row < to.rows && warp() == 0 && lane() % 4 == 0) workspace.sums[partial] = merged[half];
    }
    FLASHTILE_ROLL
    for (int n = warp(); n < kColBlocks; n += kDecodeWarps) {
      float4 x = ptx::lds_f32x4(outputs + n * 512);
      FLASHTILE_UNROLL
      for (int w = 1; w < kDecodeWarps; ++w) {
        const float4 y = ptx::lds_f32x4(outputs + w * kOutputBytes + n * 512);
        x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
      }
      const int column = accumulator_col(lane(), n, 0);
      if (out[0] != nullptr) *reinterpret_cast<float2*>(out[0] + column) = make_float2(x.x, x.y);
      if (out[1] != nullptr) *reinterpret_cast<float2*>(out[1] + column) = make_float2(x.z, x.w);
    }
  }
};

}  // namespace flashtile
