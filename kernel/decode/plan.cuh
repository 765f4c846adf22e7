// How the work of decoding is cut up and numbered; host and device agree through this file.
//
// Packed rows: of one sequence and key/value head, row r is query r / group of head
// kv_head * group + r % group. All of them share one load of the keys, which are cut into parts of
// whole steps of 64; each part leaves a normalised fp32 output and its LogSum per row in the
// workspace, which decode/combine.cuh merges.
//
// Rows, steps and parts follow from the sequence alone, so a row's bits do, too. How many thread
// blocks share the parts of a sequence follows from the call and changes no bit.
#pragma once

#include "params.h"
#include "tile/cache_rows.cuh"
#include "tile/log_sum.cuh"
#include "tile/mask.cuh"
#include "tile/row_format.cuh"
#include "tile/work.cuh"

namespace flashtile {

inline constexpr int kDecodeTile = 16;         // packed rows of a warp
inline constexpr int kDecodeWarps = 4;         // of a thread block
inline constexpr int kDecodeLimit = 64;        // packed rows of a sequence that is served like this
inline constexpr int kDecodeStep = 64;         // keys
inline constexpr int kDecodeParts = 32;        // at most, of a sequence
inline constexpr int kDecodeBlocks = 1 << 13;  // about; more would only take time to launch

FLASHTILE_HOST_DEVICE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// The parts of [begin, end) steps, all but the last of the same length.
struct DecodeParts {
  int begin, end, length, count;

  FLASHTILE_HOST_DEVICE DecodeParts(int begin, int end, int64_t num_splits)
      : begin(begin), end(end), length(1), count(0) {
    if (begin >= end) return;
    length = ceil_div(end - begin, allowed(end - begin, num_splits));
    count = ceil_div(end - begin, length);
  }
  // Long sequences take more parts: there the partial results weigh less.
  static FLASHTILE_HOST_DEVICE int allowed(int64_t steps, int64_t num_splits) {
    constexpr int kLong = 512;
    if (num_splits > 0) return static_cast<int>(smaller(num_splits, kDecodeParts));
    return steps < kLong ? kDecodeParts / 2 : kDecodeParts;
  }
  FLASHTILE_HOST_DEVICE int first(int part) const { return begin + part * length; }
  FLASHTILE_HOST_DEVICE int last(int part) const { return min_of(first(part) + length, end); }
};

// The numbering of thread blocks, and of one key/value head's packed rows over all sequences.
struct DecodePlan {
  int32_t group = 1;              // query heads of a key/value head
  int32_t rows_per_sequence = 0;  // 0: rows follow cu_seqlens_q
  int32_t most_parts = 1;
  int32_t part_blocks = 1;  // thread blocks that share the parts of a sequence and key/value head
  int64_t rows = 0;

  FLASHTILE_HOST_DEVICE bool serves(int64_t seqlen_q) const {
    return seqlen_q * group <= kDecodeLimit;
  }
  int64_t blocks(const Problem& p) const { return p.batch * p.num_heads_kv * part_blocks; }
  FLASHTILE_HOST_DEVICE int64_t partials(const Problem& p) const {
    return rows * p.num_heads_kv * most_parts;
  }
  // Of a part of a packed row; `row` as decode_first_row() counts.
  FLASHTILE_HOST_DEVICE int64_t partial(const Problem& p, int64_t row, int kv_head,
                                        int part) const {
    return (row * p.num_heads_kv + kv_head) * most_parts + part;
  }
};

inline DecodePlan decode_plan(const Problem& p) {
  DecodePlan plan;
  const int64_t group = p.group();
  const int64_t most_rows = p.rows_q() * group;  // of a sequence
  plan.group = static_cast<int32_t>(group);
  const int64_t steps = (p.cache.capacity() + kDecodeStep - 1) / kDecodeStep;
  plan.most_parts = static_cast<int32_t>(
      smaller(steps < 1 ? 1 : steps, DecodeParts::allowed(steps, p.cache.num_splits)));
  if (p.is_varlen() && most_rows <= p.batch * kDecodeLimit) {
    plan.rows = most_rows;
  } else {
    plan.rows_per_sequence = static_cast<int32_t>(smaller(most_rows, kDecodeLimit));
    plan.rows = p.batch * plan.rows_per_sequence;
  }
  const int64_t least = p.batch * p.num_heads_kv;
  const int64_t share = least == 0 ? 1 : (kDecodeBlocks + least - 1) / least;
  plan.part_blocks = static_cast<int32_t>(smaller(share, plan.most_parts));
  return plan;
}

// Whether sequences may be so long in q that decoding does not serve them, or may not.
struct DecodeForms {
  bool decode, prefill;
};
inline DecodeForms decode_forms(const Problem& p) {
  const bool all_short = p.rows_q() * p.group() <= kDecodeLimit;
  return {all_short || p.is_varlen() || p.seqused_q != nullptr, !all_short};
}

// The partial results: [partials][columns] fp32, behind them a LogSum each.
struct DecodeWorkspace {
  float* out;
  LogSum* sums;

  FLASHTILE_DEVICE DecodeWorkspace(void* workspace, int64_t partials, int columns)
      : out(static_cast<float*>(workspace)),
        sums(reinterpret_cast<LogSum*>(out + partials * columns)) {}
  static size_t bytes(int64_t partials, int columns) {
    return static_cast<size_t>(partials) * (columns * sizeof(float) + sizeof(LogSum));
  }
};

// The grid of the merge: a warp for a row and head. In a long batch, most of whose rows are not its
// own, each takes several rows.
inline constexpr int kCombineWarps = 4;
inline constexpr int64_t kCombineRows = 1024;  // of q, at once
FLASHTILE_HOST_DEVICE int64_t rows_of_all(const Problem& p) {
  return p.is_varlen() ? p.total_q : p.batch * p.seqlen_q;
}
FLASHTILE_HOST_DEVICE int64_t combine_head_blocks(const Problem& p) {
  return (p.num_heads + kCombineWarps - 1) / kCombineWarps;
}
inline int64_t combine_blocks(const Problem& p) {
  return smaller(rows_of_all(p), kCombineRows) * combine_head_blocks(p);
}

// What both kernels are given.
struct DecodeParams {
  ForwardParams forward;
  RowFormat q, k, v, out;
  Divisor page_size;
  DecodePlan plan;
  float scale_log2;  // positive_scale_log2(softmax_scale)
  bool negate_q;     // softmax_scale < 0
};

// The steps that the queries of a sequence see. What a thread block reads and what the merge
// expects are one range.
FLASHTILE_DEVICE BlockRange decode_steps(const BandMask& mask) {
  if (mask.seqlen_q <= 0) return {0, 0, 0, 0};
  return mask.key_blocks(0, mask.seqlen_q, kDecodeStep);
}

// Where a sequence's packed rows begin in the workspace.
FLASHTILE_DEVICE int64_t decode_first_row(const DecodePlan& plan, const Sequence& sequence) {
  return plan.rows_per_sequence == 0 ? sequence.row_q * plan.group
                                     : sequence.index * plan.rows_per_sequence;
}

}  // namespace flashtile
