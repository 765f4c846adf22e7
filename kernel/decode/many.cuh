// Decoding of 17 to 64 packed rows: every warp has 16 of them, and all keys.
//
// The block loads K and V together, a tile of 32 rows of each at a time; its barrier stands where
// few rows (decode/few.cuh) have the warp's. Q stays in shared memory: a third of a warp's
// registers at head dim 256. Warps without a row in use load and wait, and compute nothing.
#pragma once

#include "decode/scores.cuh"
#include "decode/stream.cuh"
#include "decode/work.cuh"
#include "tile/packed_edges.cuh"
#include "tile/product_sm80.cuh"

namespace flashtile {

template <int kHeadDim, class T, int kSlots, class Policy>
struct DecodeMany {
  using Params = typename Policy::template WithScores<DecodeParams>;
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kKeys = kDecodeStep / 2;  // of a tile
  static constexpr int kKeyBlocks = kKeys / 16;

  using QTile = SmemTile<kDecodeLimit, kHeadDim>;
  using QTarget = LoadTarget<QTile, kThreads>;
  using KvTile = SmemTile<kKeys, kHeadDim>;
  using Stream = DecodeStream<KvTile, kSlots, kThreads>;
  using Sums = DecodeSums<kHeadDim>;

  // Shared memory: the ring, Q, the shifts of the warps' softmax.
  static constexpr int kShifts = Stream::kRing + QTile::kBytes;
  static constexpr int kSharedBytes = kShifts + kDecodeLimit * sizeof(float);

  FLASHTILE_DEVICE static void run(const Params& params, const DecodeWork& work, uint32_t shared) {
    const DecodeParts& parts = work.parts;
    int part = work.first_part;
    Stream stream(params, work, shared);
    order_q(params, work, QTarget(shared + Stream::kRing, ptx::thread_index()));
    ptx::cp_async_commit();
    stream.begin(parts.first(part), parts.last(part));
    if (params.negate_q) {
      ptx::cp_async_wait<2 * Stream::kAhead>();
      negate(QTarget(shared + Stream::kRing, ptx::thread_index()));
    }
    const Rows rows(work, params.plan.group, shared);
    DecodeScores<Policy> scores(params, work, first_row());
    for (;;) {
      Sums sums(params.scale_log2, shared + kShifts + first_row() * sizeof(float));
      for (int tile = 2 * parts.first(part); tile < 2 * parts.last(part); ++tile)
        attend(stream, rows, tile, sums, scores);
      scores.end_part();
      finish({params, work, first_row(), part, kHeadDim}, sums);
      part += params.plan.part_blocks;
      if (part >= parts.count) return;
      __syncthreads();  // the ring is free
      stream.begin(parts.first(part), parts.last(part));
    }
  }

 private:
  // What is the same for all parts.
  struct Rows {
    SharedOperand<LaneAddress<QTile>, kDecodeTile> q;
    LaneAddress<KvTile> k, v;  // in slot 0
    PackedEdges edges;
    BlockRange range;
    bool in_use;

    FLASHTILE_DEVICE Rows(const DecodeWork& work, int group, uint32_t shared)
        : q{{shared + Stream::kRing, Lanes::kRowsFirst, lane(), first_row()}},
          k(shared, Lanes::kColsFirst, lane()),
          v(shared, Lanes::kRowsFirst, lane()),
          edges(work.mask, first_row(), work.rows, group, lane()),
          range(work.range),
          in_use(first_row() < work.rows) {}
  };

  // What a tile of scores goes to.
  struct To {
    Sums& sums;
    DecodeScores<Policy>& scores;
  };

  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE static int first_row() { return ptx::thread_index() / 32 * kDecodeTile; }

  // One tile of 32 keys. The wait for the first K is one for Q, too.
  FLASHTILE_DEVICE static void attend(Stream& stream, const Rows& rows, int tile, Sums& sums,
                                      DecodeScores<Policy>& scores) {
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();  // K has landed; all warps are done with the V before it
    stream.order_k();
    uint32_t p[kKeyBlocks][1][4];
    const LaneAddress<KvTile> k = rows.k.behind(stream.take_slot());
    if (rows.in_use) compute_p(rows, k, tile, {sums, scores}, p);
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();  // V has landed; all warps are done with K
    stream.order_v();
    const LaneAddress<KvTile> v = rows.v.behind(stream.take_slot());
    if (!rows.in_use) return;
    FLASHTILE_UNROLL
    for (int i = 0; i < kKeyBlocks; ++i) mma_AB_step<T>(sums.o, p[i], v, i);
  }

  FLASHTILE_DEVICE static void compute_p(const Rows& rows, const LaneAddress<KvTile>& k, int tile,
                                         const To& to, uint32_t (&p)[kKeyBlocks][1][4]) {
    Accumulator<kDecodeTile, kKeys> s;
    mma_ABt<T>(s, rows.q, k);
    if constexpr (Policy::kModifies) to.scores.to_logits(s, tile * kKeys);
    if (rows.range.is_edge(tile / 2)) rows.edges.mask(s, tile * kKeys);
    if constexpr (Policy::kModifies) to.scores.keep_tops(s);
    to.sums.softmax.raise_maximum(s, to.sums.o);
    FLASHTILE_UNROLL
    for (int i = 0; i < kKeyBlocks; ++i) {
      to.sums.softmax.exponentiate(s, i);
      to_operand<T>(p[i][0], s, 0, i);
    }
  }

  // Each warp writes its own rows.
  FLASHTILE_DEVICE static void finish(const DecodePartials& to, Sums& sums) {
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = sums.softmax.row_sum(0, half);
      if (lane() % 4 == 0) to.store_sum(half, sums.softmax.log_sum(0, half, sum));
      sums.normalise(half, sum, 1.0f);
    }
    FLASHTILE_UNROLL
    for (int n = 0; n < Sums::kColBlocks; ++n) {
      const float (&x)[4] = sums.o.d[0][n];
      to.store(n, make_float4(x[0], x[1], x[2], x[3]));
    }
  }
};

}  // namespace flashtile
