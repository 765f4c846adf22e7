// Decoding of up to 16 packed rows: every warp has all of them, and its own keys.
//
// Of every step of 64 keys each warp loads its own 16 rows of K and V, from whatever pages they are
// on, and waits for them alone. The loop has no barrier of the block; a ring of slots per warp
// keeps the copies going. P never leaves registers. After the last step the warps' sums are merged
// in a fixed order.
#pragma once

#include "decode/scores.cuh"
#include "decode/stream.cuh"
#include "decode/work.cuh"
#include "tile/packed_edges.cuh"
#include "tile/product_sm80.cuh"

namespace flashtile {

template <int kHeadDim, class T, int kSlots, class Policy>
struct DecodeFew {
  using Params = typename Policy::template WithScores<DecodeParams>;
  static constexpr int kRows = kDecodeTile;
  static constexpr int kKeys = kDecodeStep / kDecodeWarps;  // of a warp
  static constexpr int kColBlocks = kHeadDim / 8;

  using QTile = SmemTile<kRows, kHeadDim>;
  using QTarget = LoadTarget<QTile, 4 * kRows>;
  using QOperand = RegisterOperand<LaneAddress<QTile>, kRows>;
  using KvTile = SmemTile<kKeys, kHeadDim>;
  using Stream = DecodeStream<KvTile, kSlots, 32>;
  using Sums = DecodeSums<kHeadDim>;

  // Shared memory: the rings of the warps; the shifts of their softmax; their LogSums. Q passes
  // through the last slot of the last ring, the outputs that are merged through the first slots.
  static constexpr int kRings = kDecodeWarps * Stream::kRing;
  static constexpr int kOutputBytes = kRows * kHeadDim * sizeof(float);  // of a warp
  static constexpr int kVectorBytes = kDecodeWarps * kRows * sizeof(float);
  static constexpr int kSharedBytes = kRings + 3 * kVectorBytes;
  static_assert(QTile::kBytes <= KvTile::kBytes && kDecodeWarps * kOutputBytes <= kRings);

  FLASHTILE_DEVICE static void run(const Params& params, const DecodeWork& work, uint32_t rings) {
    const DecodeParts& parts = work.parts;
    int part = work.first_part;
    Stream stream(params, work, rings + warp() * Stream::kRing);
    if (ptx::thread_index() < 4 * kRows)
      order_q(params, work, QTarget(q_tile(rings), ptx::thread_index()));
    ptx::cp_async_commit();
    stream.begin(parts.first(part), parts.last(part));
    Rows rows(work, params.plan.group, rings);
    receive_q(params, rings, rows.q);
    DecodeScores<Policy> scores(params, work, 0);
    for (;;) {
      Sums sums(params.scale_log2, rings + kRings + warp() * kRows * sizeof(float));
      for (int step = parts.first(part); step < parts.last(part); ++step)
        attend(stream, rows, step, sums, scores);
      scores.end_part();
      finish(params, {params, work, 0, part, kHeadDim}, sums, rings);
      part += params.plan.part_blocks;
      if (part >= parts.count) return;
      __syncthreads();  // the outputs have been read, the rings are free
      stream.begin(parts.first(part), parts.last(part));
    }
  }

 private:
  // What is the same for all parts.
  struct Rows {
    QOperand q;
    LaneAddress<KvTile> k, v;  // in slot 0
    PackedEdges edges;
    BlockRange range;
    int first_key;  // of this warp, in a step

    FLASHTILE_DEVICE Rows(const DecodeWork& work, int group, uint32_t rings)
        : q(LaneAddress<QTile>(q_tile(rings), Lanes::kRowsFirst, lane())),
          k(rings + warp() * Stream::kRing, Lanes::kColsFirst, lane()),
          v(rings + warp() * Stream::kRing, Lanes::kRowsFirst, lane()),
          edges(work.mask, 0, work.rows, group, lane()),
          range(work.range),
          first_key(warp() * kKeys) {}
  };

  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE static int warp() { return ptx::thread_index() / 32; }

  static FLASHTILE_DEVICE uint32_t q_tile(uint32_t rings) {
    return rings + kRings - KvTile::kBytes;
  }

  // Returns when every warp has Q in its registers.
  FLASHTILE_DEVICE static void receive_q(const DecodeParams& params, uint32_t rings, QOperand& q) {
    ptx::cp_async_wait<2 * Stream::kAhead>();
    if (params.negate_q && ptx::thread_index() < 4 * kRows)
      negate(QTarget(q_tile(rings), ptx::thread_index()));
    __syncthreads();  // Q has landed, and has its sign
    q.load();
    __syncthreads();  // everybody has read Q: its place is a slot
  }

  // One step: this warp's 16 keys.
  FLASHTILE_DEVICE static void attend(Stream& stream, const Rows& rows, int step, Sums& sums,
                                      DecodeScores<Policy>& scores) {
    ptx::cp_async_wait<kSlots - 2>();
    __syncwarp();  // K has landed; all lanes are done with the V before it
    stream.order_k();
    Accumulator<kRows, kKeys> s;
    mma_ABt<T>(s, rows.q, rows.k.behind(stream.take_slot()));
    if constexpr (Policy::kModifies) scores.to_logits(s, step * kDecodeStep + rows.first_key);
    if (rows.range.is_edge(step)) rows.edges.mask(s, step * kDecodeStep + rows.first_key);
    if constexpr (Policy::kModifies) scores.keep_tops(s);
    sums.softmax.raise_maximum(s, sums.o);
    sums.softmax.exponentiate(s, 0);
    uint32_t p[1][4];
    to_operand<T>(p[0], s, 0, 0);
    ptx::cp_async_wait<kSlots - 2>();
    __syncwarp();  // V has landed; all lanes are done with K
    stream.order_v();
    mma_AB_step<T>(sums.o, p, rows.v.behind(stream.take_slot()), 0);
  }

  // Merges the warps' sums and writes the part's output and LogSums.
  FLASHTILE_DEVICE static void finish(const DecodeParams& params, const DecodePartials& to,
                                      Sums& sums, uint32_t rings) {
    float sum[2];
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] = sums.softmax.row_sum(0, half);
      if (lane() % 4 == 0)
        store_log_sum(rings, warp(), half, sums.softmax.log_sum(0, half, sum[half]));
    }
    __syncthreads();  // the warps' LogSums are there; all are done with their rings
    LogSum merged[2];
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float share = merge_rows(rings, half, params.scale_log2, merged[half]);
      sums.normalise(half, sum[half], share);
    }
    const uint32_t outputs = rings + lane() * 16;
    FLASHTILE_UNROLL
    for (int n = 0; n < kColBlocks; ++n)
      ptx::sts_f32x4(outputs + warp() * kOutputBytes + n * 512, sums.o.d[0][n]);
    __syncthreads();  // the warps' outputs are there
    store_part(to, merged, outputs);
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

  // Each warp adds up and writes every fourth block of 8 columns.
  FLASHTILE_DEVICE static void store_part(const DecodePartials& to, const LogSum (&merged)[2],
                                          uint32_t outputs) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (warp() == 0 && lane() % 4 == 0) to.store_sum(half, merged[half]);
    }
    FLASHTILE_ROLL
    for (int n = warp(); n < kColBlocks; n += kDecodeWarps) {
      float4 x = ptx::lds_f32x4(outputs + n * 512);
      FLASHTILE_UNROLL
      for (int w = 1; w < kDecodeWarps; ++w) {
        const float4 y = ptx::lds_f32x4(outputs + w * kOutputBytes + n * 512);
        x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
      }
      to.store(n, x);
    }
  }
};

}  // namespace flashtile
