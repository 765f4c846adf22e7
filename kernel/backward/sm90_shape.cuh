// What the pieces of the sm_90a backward have in common: sizes, the map of shared memory, the order
// of dQ, the arguments.
#pragma once

#include "backward/layout.cuh"
#include "backward/notes.cuh"
#include "backward/transposed_scores.cuh"
#include "cuda/tensor_map.h"
#include "ptx/hopper.cuh"
#include "tile/accumulator.cuh"
#include "tile/ring_sm90.cuh"

namespace flashtile {

// The notes of a thread block (backward/notes.cuh): what it has to do. One thread finds out.
struct RangeNotes {  // blocks of queries, within the sequence; none if begin >= end
  int begin, full_begin;
  int clean_end;  // one past the last block that is whole and seen whole
  int end;
  static constexpr int kOffset = 0;
};
struct BandNotes {  // for key `i` of the block
  int begin;        // i + begin is the first query that sees it
  int end;          // i + end is one past the last one
  int keys;         // of the block, in use
  int first_slot;   // of the sequence's first block of queries, in the first query head
  static constexpr int kOffset = 16;
};
struct RowNotes {
  int key_row;    // of the block's first key, in k
  int query_row;  // of the sequence's first query, in q
  int seqlen_q;
  int batch;
  static constexpr int kOffset = 32;
};
struct HeadNotes {
  int head_kv;
  int index;        // of the thread block's work
  int before;       // of the key block whose turn is before ours; -1: none
  int before_from;  // its first block of queries, within the sequence
  static constexpr int kOffset = 48;
};
inline constexpr int kBackwardNotesBytes = 64;

// The arguments of the main kernel. Policy: PlainScores or ModifiedScores.
template <class Policy = PlainScores>
struct BackwardLaunchSm90 {
  typename Policy::template WithScores<BackwardLaunch> base;
  TensorMap q, k, v, dout;  // boxes of 64 columns and a block of rows
};

template <int kHeadDimValue, Variant kVariant = Variant::kPlain>
struct BackwardShapeSm90 {
  static constexpr int kHeadDim = kHeadDimValue;
  using Policy = ScorePolicyOf<kVariant>;
  using Launch = typename Policy::template WithScores<BackwardLaunch>;
  static constexpr BackwardConfigSm90 kConfig = backward_config_sm90(kHeadDim, kVariant);
  static constexpr int kBlockQ = kConfig.block_q;
  static constexpr int kBlockK = kConfig.block_k;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kWarpgroups = 2;  // that compute
  static constexpr int kGroupThreads = 128;
  static constexpr int kConsumers = kWarpgroups * kGroupThreads;
  static constexpr int kThreads = kConsumers + kGroupThreads;
  static constexpr int kGroupKeys = 64;  // rows of one wgmma
  // Both warpgroups have the same keys: one computes P and dV, the other dS and dK.
  static constexpr bool kRoles = kBlockK == kGroupKeys;
  static_assert(kRoles || kBlockK == kWarpgroups * kGroupKeys);

  using KeyTile = WideTile<kBlockK, kHeadDim>;    // K, V
  using QueryTile = WideTile<kBlockQ, kHeadDim>;  // Q, dO
  // dK, dV in the places of K and V, with the last panel whole.
  using GradientTile = WideTile<kBlockK, KeyTile::kPanels * kPanelCols>;
  using ScoreTile = WideTile<kBlockQ, kBlockK>;  // dS: [query, key]
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;
  using QueryRing = Ring<kStages>;             // every warp that computes is a consumer
  using Scores = Accumulator<16, kBlockQ>;     // S^T, dP^T: a warp's keys, all queries
  using Packed = uint32_t[kBlockQ / 16][4];    // P^T, dS^T: register operands, pairs of T
  using Gradient = Accumulator<16, kHeadDim>;  // dK, dV

  // dQ: with 128 queries each warpgroup takes half of the rows, with 64 some panels of columns; the
  // second none where there is one panel.
  static constexpr bool kSplitRows = kBlockQ == 128;
  static constexpr int kFirstPanels = (kHeadDim / kPanelCols + 1) / 2;  // of the first warpgroup
  static_assert(kSplitRows || kBlockQ == 64);
  static FLASHTILE_HOST_DEVICE int dq_panel(int group) {
    return kSplitRows ? 0 : group * kFirstPanels;
  }
  static FLASHTILE_HOST_DEVICE int dq_cols(int group) {
    if (kSplitRows) return kHeadDim;
    return group == 0 ? kFirstPanels * kPanelCols : kHeadDim - kFirstPanels * kPanelCols;
  }
  // Floats of dQ in the slot before those of a warpgroup.
  static FLASHTILE_HOST_DEVICE int dq_floats(int group) {
    return 64 * (kSplitRows ? group * kHeadDim : dq_panel(group) * kPanelCols);
  }
  static constexpr bool kBulkReduce = kConfig.dq_path == DqPath::kBulkReduce;

  // Bytes.
  static constexpr int kStatisticsBytes = 12 * kBlockQ;
  static constexpr int kScoreStages = kRoles ? 1 : 2;
  static constexpr int kK = 0;
  static constexpr int kV = kK + KeyTile::kBytes;
  static constexpr int kQ = kV + KeyTile::kBytes;
  static constexpr int kDout = kQ + kStages * QueryTile::kBytes;
  static constexpr int kScores = kDout + kStages * QueryTile::kBytes;
  static constexpr int kExchange = kScores + kScoreStages * ScoreTile::kBytes;  // P^T, of roles
  static constexpr int kDq =  // fp32, in the order of the slot
      kExchange + (kRoles ? kGroupThreads * static_cast<int>(sizeof(Packed)) : 0);
  static constexpr int kStatistics = kDq + (kBulkReduce ? 4 * Slot::kDq : 0);
  static constexpr int kBarriers = kStatistics + kStages * kStatisticsBytes;
  static constexpr int kKeysFull = kBarriers;  // one mbarrier: K and V have landed
  static constexpr int kQRing = kKeysFull + kMbarrierBytes;
  static constexpr int kDoutRing = kQRing + QueryRing::kBytes;  // of dO and the statistics
  static constexpr int kNotes = (kDoutRing + QueryRing::kBytes + 15) / 16 * 16;
  // With scores: the notes of every warp that computes, and what roles exchange beside P^T, a
  // lane's bits of dropout.
  static constexpr int kScoreNotes = kNotes + kBackwardNotesBytes;
  static constexpr int kKept = kScoreNotes + kConsumers / 32 * TransposedNotes::kBytes;
  static constexpr int kBytes =
      !Policy::kModifies ? kScoreNotes : kKept + (kRoles ? 4 * kGroupThreads : 0);
  static_assert(kStatisticsBytes % 16 == 0 && kBytes <= kSharedLimitSm90);
};

// Named barriers of the warps that compute, and of those that reduce; 0 is __syncthreads.
enum BackwardBarrier {
  kAllConsumers = 1,
  kOwnGroup = 2,  // and 3: of one warpgroup
  kProbabilitiesThere = 4,
  kScoresThere = 5,
  kDqFree = 6,   // and 7: a warpgroup's place for dQ has been read
  kDqThere = 8,  // and 9: it has been filled
};

// Where dQ's accumulators lie: [warpgroup][n8 block][thread][4], one float4 per thread.
template <int kHeadDim, Variant kVariant = Variant::kPlain>
struct DqOrderSm90 {
  using Shape = BackwardShapeSm90<kHeadDim, kVariant>;
  static constexpr int kBlockQ = Shape::kBlockQ;
  static constexpr int kBlockFloats = 4 * Shape::kGroupThreads;  // from n8 block to n8 block

  // Floats from the start of the slot to (row, col), col a multiple of 8. Columns col + 2 i and
  // col + 2 i + 1 lie 4 i and 4 i + 1 floats further, i < 4.
  static FLASHTILE_HOST_DEVICE int offset(int row, int col) {
    const int group = Shape::kSplitRows ? row / 64 : col >= Shape::dq_cols(0);
    const int thread = row % 64 / 16 * 32 + row % 8 * 4;
    const int block = (col - Shape::dq_panel(group) * kPanelCols) / 8;
    return Shape::dq_floats(group) + block * kBlockFloats + thread * 4 + row / 8 % 2 * 2;
  }
  static FLASHTILE_DEVICE void load(const float* slot, int row, int col, float (&x)[8]) {
    const float* const source = slot + offset(row, col);
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(source + 4 * i);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

}  // namespace flashtile
