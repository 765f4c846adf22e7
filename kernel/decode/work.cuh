// What both forms of decoding share: a thread block's work, Q, the sums of 16 packed rows, and
// where a part's results go.
#pragma once

#include "decode/plan.cuh"
#include "tile/accumulator.cuh"
#include "tile/load_sm80.cuh"
#include "tile/softmax.cuh"

namespace flashtile {

// The packed rows of one sequence and key/value head, and the parts of its keys.
struct DecodeWork {
  int kv_head;
  Sequence sequence;
  int rows;  // packed rows in use, 0 where the sequence is not served like this
  BandMask mask;
  BlockRange range;  // steps that the rows see
  DecodeParts parts;
  int first_part;         // of the block; it takes every DecodePlan::part_blocks'th
  int64_t first_partial;  // of packed row 0, part 0

  // Neighbouring blocks read neighbouring heads of the same keys.
  FLASHTILE_DEVICE DecodeWork(const DecodeParams& params, int block)
      : DecodeWork(params, block % static_cast<int>(params.forward.problem.num_heads_kv),
                   block / static_cast<int>(params.forward.problem.num_heads_kv)) {}

  FLASHTILE_DEVICE bool empty() const { return rows == 0 || first_part >= parts.count; }

 private:
  FLASHTILE_DEVICE DecodeWork(const DecodeParams& params, int head, int index)
      : kv_head(head),
        sequence(cache_sequence_of(params.forward.problem, index / params.plan.part_blocks)),
        rows(params.plan.serves(sequence.seqlen_q) ? sequence.seqlen_q * params.plan.group : 0),
        mask(band_mask(params.forward.problem, sequence)),
        range(decode_steps(mask)),
        parts(range.begin, range.end, params.forward.problem.cache.num_splits),
        first_part(index % params.plan.part_blocks),
        first_partial(params.plan.partial(params.forward.problem,
                                          decode_first_row(params.plan, sequence), head, 0)) {}
};

// The output of 16 packed rows, not yet divided by its sums.
template <int kHeadDim>
struct DecodeSums {
  static constexpr int kColBlocks = kHeadDim / 8;
  Accumulator<kDecodeTile, kHeadDim> o;
  OnlineSoftmax<kDecodeTile> softmax;

  FLASHTILE_DEVICE DecodeSums(float scale_log2, uint32_t shifts) : softmax(scale_log2, shifts) {
    clear(o);
  }

  // o / sum * share. A row that has seen no key is 0, also where a value that others see is NaN.
  FLASHTILE_DEVICE void normalise(int half, float sum, float share) {
    const float factor = share / sum;
    FLASHTILE_UNROLL
    for (int n = 0; n < kColBlocks; ++n) {
      FLASHTILE_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        o.d[0][n][i] = sum == 0.0f ? 0.0f : o.d[0][n][i] * factor;
    }
  }
};

// Rows of a warp's part in the workspace: this lane's two, lane / 4 and lane / 4 + 8.
struct DecodePartials {
  float* out[2];  // their first column; null: a row that is not in use
  LogSum* sums[2];

  // The part `part` of the rows from `row0` on.
  FLASHTILE_DEVICE DecodePartials(const DecodeParams& params, const DecodeWork& work, int row0,
                                  int part, int head_dim) {
    const Problem& problem = params.forward.problem;
    const DecodeWorkspace workspace(params.forward.workspace, params.plan.partials(problem),
                                    head_dim);
    FLASHTILE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + accumulator_row(ptx::thread_index() % 32, 0, 2 * half);
      const int64_t partial = work.first_partial + params.plan.partial(problem, row, 0, part);
      out[half] = row < work.rows ? workspace.out + partial * head_dim : nullptr;
      sums[half] = workspace.sums + partial;
    }
  }

  // The lane's numbers of columns 8 * n on: x[0], x[1] of its first row, x[2], x[3] of its second.
  FLASHTILE_DEVICE void store(int n, const float4& x) const {
    const int column = accumulator_col(ptx::thread_index() % 32, n, 0);
    if (out[0] != nullptr) *reinterpret_cast<float2*>(out[0] + column) = make_float2(x.x, x.y);
    if (out[1] != nullptr) *reinterpret_cast<float2*>(out[1] + column) = make_float2(x.z, x.w);
  }
  // By one lane of a row.
  FLASHTILE_DEVICE void store_sum(int half, const LogSum& sum) const {
    if (out[half] != nullptr) *sums[half] = sum;
  }
};

// Copies the packed rows of Q, four threads a row; rows that are not in use become zeros.
template <class Tile, int kThreads>
FLASHTILE_DEVICE void order_q(const DecodeParams& params, const DecodeWork& work,
                              const LoadTarget<Tile, kThreads>& target) {
  using Loader = TileLoader<Tile, kThreads>;
  const View& q = params.forward.q;
  const int group = params.plan.group;
  FLASHTILE_UNROLL
  for (int pass = 0; pass < target.kPasses; ++pass) {
    const int row = load_row<Tile>(ptx::thread_index()) + pass * target.kRowsPerPass;
    const int head = work.kv_head * group + row % group;
    const char* const source =
        row_address(q, work.sequence, work.sequence.row_q + row / group, head) +
        Loader::first_column();
    Loader::copy_row(target.at(pass, 0), source,
                     row < work.rows ? params.q.bytes - Loader::first_column() : 0, params.q.unit);
  }
}

}  // namespace flashtile
