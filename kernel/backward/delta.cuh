// First launch of the backward: delta_i = sum_c dO_ic O_ic - dLSE_i for every query, in fp32
// (FlashAttention-2, Algorithm 2, line 4; dLSE enters dS = P (dP - delta) with the opposite sign).
//
// Also rewrites lse in base 2 and clears the fp32 dQ that the main kernel adds to. One block per
// slot and head; kLanes neighbouring lanes read one row, 16 bytes each. A query that sees no key,
// and a row that is not in use, gets lse = +inf: its probabilities exp2(s - lse) are exactly 0.
#pragma once

#include <bit>

#include "backward/layout.cuh"
#include "tile/scores.cuh"
#include "tile/unpack.cuh"

namespace flashtile {

// Order: the main kernel's of dQ. kTurns: how many of TurnWords a block of keys has.
template <class T, int kHeadDim, class Order, int kTurns, class Policy = PlainScores>
struct BackwardDelta {
  using Params = typename Policy::template WithScores<BackwardLaunch>;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kSharedBytes = 0;
  static constexpr int kLanes = std::bit_ceil(kHeadDim / 8u);
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kBlockQ = Order::kBlockQ;
  using Slot = BackwardSlot<kBlockQ, kHeadDim>;

  static FLASHTILE_DEVICE void run(const Params& launch, char*) {
    const BackwardParams& p = launch.params;
    const int thread = ptx::thread_index();
    clear_turns(launch, thread);
    const RowBlock block =
        row_block<Side::kQueries, kBlockQ, kBlockQ>(p.problem, launch.slots_q, ptx::block_index());
    if (block.empty()) return;
    const int64_t tile = block.head * launch.slots_q + block.slot;
    clear_dq(Slot::dq(launch, tile), thread);
    float* const statistics = Slot::statistics(launch, tile);
    bool huge = false;
    FLASHTILE_UNROLL
    for (int row = thread / kLanes; row < kBlockQ; row += kRowsPerPass) {
      const float sum =
          row < block.rows ? row_dot(launch, block, block.row0 + row, thread % kLanes) : 0.0f;
      float delta = sum_over_lanes(sum);
      float lse = INFINITY;
      if (row < block.rows) {
        const Sequence& s = block.sequence;
        const int64_t query = s.row_q + block.row0 + row;
        lse = *row_address(p.lse, s, query, block.head);
        if (p.dlse.data != nullptr) delta -= *row_address(p.dlse, s, query, block.head);
        if (lse == -INFINITY) {
          lse = INFINITY;
          delta = 0.0f;
        }
        huge |= is_huge(lse);
        lse -= lse_margin(lse);
        if constexpr (Policy::kModifies) {
          delta /= launch.scores.kept_factor;  // the main kernel has the factor in P
        }
      }
      if (thread % kLanes == 0) {
        statistics[Slot::lse(row)] = lse * kLog2e;
        statistics[Slot::minus_delta(row)] = -delta;
        statistics[Slot::minus_delta(row) + 2] = -delta;
      }
    }
    huge = __syncthreads_or(huge) != 0;
    if (thread == 0) statistics[Slot::kHuge] = huge ? 1.0f : 0.0f;
  }

  // Scores beyond 2^22 are so coarse in fp32, and with them the LSE, that exp(score - lse) of a
  // row's largest score could be anything. A few units of their last place less than the LSE, and
  // the main kernel's limit of 1, make it 1.
  static FLASHTILE_DEVICE bool is_huge(float lse) {
    return fabsf(lse) > 4194304.0f && fabsf(lse) < INFINITY;
  }
  static FLASHTILE_DEVICE float lse_margin(float lse) {
    return is_huge(lse) ? fabsf(lse) * 4.76837158203125e-7f : 0.0f;  // 2^-21
  }

  static FLASHTILE_DEVICE void clear_turns(const Params& launch, int thread) {
    const Problem& p = launch.params.problem;
    if (!p.deterministic) return;
    const int64_t words = TurnWords::count(kTurns * launch.slots_k * p.num_heads_kv);
    const int64_t threads = launch.slots_q * p.num_heads * kThreads;
    for (int64_t i = int64_t{ptx::block_index()} * kThreads + thread; i < words; i += threads) {
      launch.turns[i] = TurnWords::at_start(i);
    }
  }

  static FLASHTILE_DEVICE void clear_dq(float* dq, int thread) {
    FLASHTILE_UNROLL
    for (int i = 4 * thread; i < Slot::kDq; i += 4 * kThreads) {
      *reinterpret_cast<float4*>(dq + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  // This lane's eight columns of dO . O in one row.
  static FLASHTILE_DEVICE float row_dot(const Params& launch, const RowBlock& block, int row,
                                        int lane) {
    const Sequence& s = block.sequence;
    const BackwardParams& p = launch.params;
    const uint4 x = row_chunk(p.out, launch.out, s, s.row_q + row, block.head, lane);
    const uint4 y = row_chunk(p.dout, launch.dout, s, s.row_q + row, block.head, lane);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w};  // pairs of T
    const uint32_t ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.0f;
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(xs[i]);
      const float2 b = unpack<T>(ys[i]);
      sum += a.x * b.x + a.y * b.y;
    }
    return sum;
  }

  static FLASHTILE_DEVICE uint4 row_chunk(const View& view, const RowFormat& format,
                                          const Sequence& s, int64_t row, int head, int lane) {
    const char* const source = row_address(view, s, row, head, 8 * lane);
    const int bytes = format.bytes - lane * kChunkBytes;
    if (format.unit == kChunkBytes && bytes > 0) return *reinterpret_cast<const uint4*>(source);
    return load_elements(source, bytes);
  }

  static FLASHTILE_DEVICE float sum_over_lanes(float x) {
    FLASHTILE_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

}  // namespace flashtile
