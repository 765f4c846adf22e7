// Behind decode/sm80.cuh: merges the parts of every row, or writes zeros where there are none. A
// warp per row and head; rows of sequences that decoding does not serve are left alone.
#pragma once

#include "config.cuh"
#include "decode/plan.cuh"
#include "tile/finish_scores.cuh"
#include "tile/row_format.cuh"
#include "tile/smem_tile.cuh"

namespace flashtile {

// kMemory: of the slice. The same code in both classes, but each has its own copy (launch.cuh).
template <int kHeadDim, Memory kMemory, class T, class Policy = PlainScores>
struct DecodeCombine {
  using ScorePolicy = Policy;
  using Params = typename Policy::template WithScores<DecodeParams>;
  static constexpr int kThreads = kCombineWarps * 32;
  static constexpr int kBlocksPerSm = 8;
  static constexpr int kSharedBytes = 0;
  static constexpr int kLaneCols = 4;
  static constexpr int kPasses = (kHeadDim + 32 * kLaneCols - 1) / (32 * kLaneCols);

  FLASHTILE_DEVICE static void run(const Params& params, char*) {
    const Problem& problem = params.forward.problem;
    const int head_blocks = static_cast<int>(combine_head_blocks(problem));
    const int index = ptx::block_index();
    const int head = index % head_blocks * kCombineWarps + ptx::thread_index() / 32;
    if (head >= problem.num_heads) return;
    const int64_t rows = rows_of_all(problem);
    for (int64_t row = index / head_blocks; row < rows; row += ptx::grid_size() / head_blocks)
      combine_row(params, row, head);
  }

 private:
  struct Row {
    Sequence sequence;
    int query;  // of the sequence
  };

  FLASHTILE_DEVICE static Row row_of(const Problem& problem, int64_t index) {
    if (!problem.is_varlen()) {
      const int64_t b = index / problem.seqlen_q;
      return {cache_sequence_of(problem, b), static_cast<int>(index - b * problem.seqlen_q)};
    }
    const int b = last_begun(static_cast<int>(problem.batch),
                             [&](int sequence) { return problem.cu_seqlens_q[sequence] <= index; });
    const Sequence sequence = cache_sequence_of(problem, b);
    return {sequence, static_cast<int>(index - sequence.row_q)};
  }

  FLASHTILE_DEVICE static void combine_row(const Params& params, int64_t index, int head) {
    const Problem& problem = params.forward.problem;
    const Row row = row_of(problem, index);
    const Sequence& sequence = row.sequence;
    const bool owned = row.query >= 0 && row.query < sequence.owned_q;
    if (!owned || !params.plan.serves(sequence.seqlen_q)) return;
    const BandMask mask = band_mask(problem, sequence);
    const bool empty = row.query >= sequence.seqlen_q || mask.sees_no_key(row.query);
    const int lane = ptx::thread_index() % 32;
    float4 out[kPasses];
    FLASHTILE_UNROLL
    for (int i = 0; i < kPasses; ++i) out[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    LogSum sum = log_sum_of_nothing();
    if (!empty) sum = add_parts(params, row, head, mask, out);
    if constexpr (Policy::kModifies) {
      const float sum_log2 = sum.value(params.scale_log2);
      const float lse_log2 = join_sink(params, row, head, sum_log2, out);
      store(params, row, head, out);
      store_lse(params, row, head, lse_log2 * kLn2);
      return;
    }
    store(params, row, head, out);
    const RowView& lse = params.forward.lse;
    if (lse.data != nullptr && lane == 0) {
      *row_address(lse, sequence, sequence.row_q + row.query, head) =
          empty ? negative_infinity() : sum.value(params.scale_log2) * kLn2;
    }
  }

  FLASHTILE_DEVICE static void store_lse(const Params& params, const Row& row, int head,
                                         float value) {
    const RowView& lse = params.forward.lse;
    if (lse.data == nullptr || ptx::thread_index() % 32 != 0) return;
    *row_address(lse, row.sequence, row.sequence.row_q + row.query, head) = value;
  }

  // log2 of the row's sum with its sink.
  FLASHTILE_DEVICE static float join_sink(const Params& params, const Row& row, int head,
                                          float sum_log2, float4 (&out)[kPasses]) {
    const RowBlock work = {.sequence = row.sequence, .head = head};
    const float sink = sink_log2(params.scores.of.sink, work, row.query);
    const JoinedSum whole(sum_log2, sink);
    const bool hidden = sum_log2 == negative_infinity();  // all keys are
    const auto joined = [&](float x) { return hidden ? 0.0f : x * whole.share; };
    FLASHTILE_UNROLL
    for (float4& x : out) x = make_float4(joined(x.x), joined(x.y), joined(x.z), joined(x.w));
    return hidden ? sink : whole.log2;
  }

  // Lane p weighs part p; then all lanes add up the parts in order.
  FLASHTILE_DEVICE static LogSum add_parts(const Params& params, const Row& row, int head,
                                           const BandMask& mask, float4 (&out)[kPasses]) {
    const Problem& problem = params.forward.problem;
    const int group = params.plan.group;
    const int packed = row.query * group + head % group;
    const BlockRange range = decode_steps(mask);
    const DecodeParts parts(range.begin, range.end, problem.cache.num_splits);
    const DecodeWorkspace workspace(params.forward.workspace, params.plan.partials(problem),
                                    kHeadDim);
    const int64_t first = params.plan.partial(
        problem, decode_first_row(params.plan, row.sequence) + packed, head / group, 0);
    const int lane = ptx::thread_index() % 32;
    const LogSum own = lane < parts.count ? workspace.sums[first + lane] : log_sum_of_nothing();
    const LogSum largest = largest_of(own, params.scale_log2);
    const float weight = own.weight(largest, params.scale_log2);
    float weights = weight;
    FLASHTILE_UNROLL
    for (int step = 1; step < 32; step *= 2) weights += __shfl_xor_sync(0xffffffffu, weights, step);
    const float share = weight / weights;
    const float* source = workspace.out + first * kHeadDim + lane * kLaneCols;
    _Pragma("unroll 4") for (int part = 0; part < parts.count; ++part) {
      add_part(source, __shfl_sync(0xffffffffu, share, part), out);
      source += kHeadDim;
    }
    return largest.times(weights);
  }

  FLASHTILE_DEVICE static LogSum largest_of(const LogSum& own, float scale_log2) {
    const float value = own.value(scale_log2);
    float largest = value;
    FLASHTILE_UNROLL
    for (int step = 1; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // None where all are NaN, as the result then is, whatever the lane.
    const uint32_t lanes = __ballot_sync(0xffffffffu, value == largest);
    const int lane = max(31 - __clz(static_cast<int>(lanes)), 0);
    return {__shfl_sync(0xffffffffu, own.shift, lane), __shfl_sync(0xffffffffu, own.near, lane)};
  }

  FLASHTILE_DEVICE static void add_part(const float* source, float share, float4 (&out)[kPasses]) {
    FLASHTILE_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      if (!has_columns(i)) continue;
      const float4 x = reinterpret_cast<const float4*>(source)[32 * i];
      out[i].x = fmaf(x.x, share, out[i].x);
      out[i].y = fmaf(x.y, share, out[i].y);
      out[i].z = fmaf(x.z, share, out[i].z);
      out[i].w = fmaf(x.w, share, out[i].w);
    }
  }
  FLASHTILE_DEVICE static int column(int i) {
    return (ptx::thread_index() % 32 + 32 * i) * kLaneCols;
  }
  FLASHTILE_DEVICE static bool has_columns(int i) { return column(i) < kHeadDim; }

  FLASHTILE_DEVICE static void store(const Params& params, const Row& row, int head,
                                     const float4 (&out)[kPasses]) {
    char* const first =
        row_address(params.forward.out, row.sequence, row.sequence.row_q + row.query, head);
    FLASHTILE_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      const int bytes = params.out.bytes - 2 * column(i);
      if (bytes <= 0) continue;
      char* const place = first + 2 * column(i);
      const uint2 x =
          make_uint2(ptx::pack<T>(out[i].x, out[i].y), ptx::pack<T>(out[i].z, out[i].w));
      if (params.out.unit == kChunkBytes) {
        *reinterpret_cast<uint2*>(place) = x;
      } else {
        store_chunk(place, make_uint4(x.x, x.y, 0, 0), min(bytes, 8), params.out.unit);
      }
    }
  }
};

}  // namespace flashtile
