// The tuning table: one row per (pass, memory class, head_dim). A row changes speed, never results.
// A head dim without a row does not compile.
//
// Memory classes: kLarge is 163 KB of shared memory per block and more (sm_80, sm_87, sm_90),
// kSmall is 99 KB (sm_86, sm_89, sm_120). Values come from reading the machine code (`make
// sass-report`).
#pragma once

#include <cstddef>

#include "ptx/common.cuh"

namespace flashtile {

enum class Memory { kLarge, kSmall };

// What a slice's kernels do between Q K^T and P V (tile/scores.cuh).
enum class Variant {
  kPlain,     // softmax_scale and the band
  kModified,  // everything that flashtile_scores has, at run time
};

FLASHTILE_HOST_DEVICE int shared_memory_limit(Memory memory) {
  return memory == Memory::kLarge ? 163 * 1024 : 99 * 1024;
}

inline constexpr int kSharedLimitSm90 = 227 * 1024;

template <class Config>
struct ConfigRow {
  int head_dim;
  Config config;
};

void head_dim_without_a_row();  // exists nowhere: no constant can come from it

template <class Config, size_t kRows>
consteval Config find_row(const ConfigRow<Config> (&table)[kRows], int head_dim) {
  for (const ConfigRow<Config>& row : table) {
    if (row.head_dim == head_dim) return row.config;
  }
  head_dim_without_a_row();
  return {};
}

struct ForwardConfig {
  int block_q;        // queries per thread block
  int block_k;        // keys per step
  int warps;          // each owns block_q / warps rows
  int blocks_per_sm;  // what registers and shared memory are planned for
  bool q_in_registers;
};

// 32 rows per warp read shared memory half as often as 16; 16 rows suffice for the slower tensor
// cores of the small class, whose shared memory holds two such blocks.
inline constexpr ConfigRow<ForwardConfig> kForwardLarge[] = {
    {32, {128, 64, 4, 3, true}},   {64, {128, 64, 4, 2, true}},  {96, {128, 64, 4, 2, false}},
    {128, {128, 64, 4, 2, false}}, {192, {128, 64, 8, 1, true}}, {256, {128, 64, 8, 1, false}}};
inline constexpr ConfigRow<ForwardConfig> kForwardSmall[] = {
    {32, {128, 128, 4, 2, true}}, {64, {128, 64, 4, 2, true}},  {96, {128, 64, 4, 2, false}},
    {128, {64, 64, 4, 2, true}},  {192, {128, 64, 8, 1, true}}, {256, {64, 64, 4, 1, false}}};
inline constexpr ConfigRow<ForwardConfig> kForwardLargeScores[] = {
    {64, {128, 64, 4, 2, true}}, {128, {128, 32, 4, 2, false}}, {256, {128, 64, 8, 1, false}}};
inline constexpr ConfigRow<ForwardConfig> kForwardSmallScores[] = {
    {64, {128, 64, 4, 2, true}}, {128, {64, 64, 4, 2, true}}, {256, {64, 64, 4, 1, false}}};
consteval ForwardConfig forward_config(Memory memory, int head_dim,
                                       Variant variant = Variant::kPlain) {
  const bool large = memory == Memory::kLarge;
  return variant == Variant::kPlain
             ? find_row(large ? kForwardLarge : kForwardSmall, head_dim)
             : find_row(large ? kForwardLargeScores : kForwardSmallScores, head_dim);
}

// One thread block of decoding (decode/sm80.cuh): slots of 64 rows of K or V in shared memory, an
// odd number, so that K and V of a step are ordered half the slots ahead. Two blocks to a
// multiprocessor where they fit: one loads while the other merges.
struct DecodeConfig {
  int slots;
  int blocks_per_sm;

  // Of 32 rows, beside a Q of 64; odd, too.
  constexpr int half_slots() const { return 2 * slots - 3; }
};

inline constexpr ConfigRow<DecodeConfig> kDecodeLarge[] = {
    {32, {7, 3}}, {64, {7, 2}}, {96, {5, 2}}, {128, {5, 2}}, {192, {5, 1}}, {256, {5, 1}}};
inline constexpr ConfigRow<DecodeConfig> kDecodeSmall[] = {
    {32, {7, 3}}, {64, {5, 2}}, {96, {3, 2}}, {128, {3, 2}}, {192, {3, 1}}, {256, {3, 1}}};
consteval DecodeConfig decode_config(Memory memory, int head_dim) {
  return find_row(memory == Memory::kLarge ? kDecodeLarge : kDecodeSmall, head_dim);
}

// One thread block of the forward for sm_90a: `consumers` warpgroups own 64 queries each, one more
// loads. Registers per thread: launch registers times threads are shared out, 168 x 384 = 128 x (40
// + 232 + 232), 128 x 512 = 128 x (32 + 160 + 160 + 160).
struct ForwardSm90Config {
  int block_k;    // keys per step
  int consumers;  // warpgroups
  int stages;     // blocks of K, and of V, in shared memory
  int q_stages;   // tiles of Q: 2, the next one arrives while one is worked on, where they fit
  int producer_registers, consumer_registers;

  FLASHTILE_HOST_DEVICE int block_q() const { return 64 * consumers; }
  FLASHTILE_HOST_DEVICE int threads() const { return 128 * (consumers + 1); }
};

inline constexpr ConfigRow<ForwardSm90Config> kForwardSm90[] = {
    {64, {128, 3, 2, 2, 32, 160}},  {96, {128, 2, 2, 2, 40, 232}}, {128, {128, 2, 2, 2, 40, 232}},
    {192, {112, 2, 2, 1, 40, 232}}, {256, {80, 2, 2, 1, 40, 232}},
};
inline constexpr ConfigRow<ForwardSm90Config> kForwardSm90Scores[] = {
    {64, {128, 2, 2, 2, 40, 232}},
    {128, {128, 2, 2, 2, 24, 240}},
    {256, {80, 2, 2, 1, 24, 240}},
};
consteval ForwardSm90Config forward_sm90_config(int head_dim, Variant variant = Variant::kPlain) {
  return variant == Variant::kPlain ? find_row(kForwardSm90, head_dim)
                                    : find_row(kForwardSm90Scores, head_dim);
}

// The same over a cache whose rows four warps copy one by one, for which they take more registers
// where the computing ones can spare some. Blocks of keys are the forward's, so a row's bits are.
consteval ForwardSm90Config page_rows_config(int head_dim, Variant variant = Variant::kPlain) {
  ForwardSm90Config config = forward_sm90_config(head_dim, variant);
  config.consumers = 2;
  const bool spares = head_dim <= 192 && variant == Variant::kPlain;
  config.producer_registers = head_dim == 64 ? 104 : spares ? 56 : 40;
  config.consumer_registers = head_dim == 64 ? 200 : spares ? 224 : 232;
  return config;
}

// One thread block of the backward: block_k keys against blocks of block_q queries. warps_k x
// warps_q warps share the scores; each keeps dK and dV of its keys in registers.
struct BackwardConfig {
  int block_q, block_k;
  int warps_k, warps_q;
  int dq_warps_q;       // rows of the warp grid for the dQ product
  bool split_head_dim;  // warps_q warps split the columns of dK, dV and exchange P, dS; else each
                        // sums over its own queries and the partial sums are added at the end
  bool v_in_registers;  // V is read from shared memory once, and its place reused
  bool one_exchange;    // P^T and dS^T pass through the same place
  int stages_q;         // blocks of Q in shared memory: 2, the next arrives while one is read, or 1
  int stages_dout;      // the same for dO and the statistics
  int dq_passes = 1;    // the columns of dQ are computed in so many parts, for want of registers

  FLASHTILE_HOST_DEVICE int warps() const { return warps_k * warps_q; }
};

inline constexpr ConfigRow<BackwardConfig> kBackwardLarge[] = {
    {32, {64, 128, 4, 2, 4, false, false, false, 2, 2}},
    {64, {64, 128, 4, 2, 4, false, true, false, 2, 2}},
    {96, {64, 128, 4, 2, 4, true, false, false, 2, 2}},
    {128, {64, 128, 4, 2, 2, true, false, false, 2, 2}},
    {192, {64, 64, 2, 4, 2, true, false, true, 2, 2}},
    {256, {64, 64, 2, 4, 2, true, false, true, 1, 1}},
};
inline constexpr ConfigRow<BackwardConfig> kBackwardSmall[] = {
    {32, {64, 128, 4, 2, 4, false, false, false, 2, 2}},
    {64, {64, 128, 4, 2, 4, false, false, false, 2, 2}},
    {96, {64, 128, 8, 1, 4, false, true, false, 2, 2}},
    {128, {32, 128, 8, 1, 2, false, true, false, 2, 2}},
    {192, {64, 64, 4, 2, 2, true, true, true, 1, 1}},
    {256, {32, 64, 4, 2, 2, true, true, true, 1, 1, 2}},
};
inline constexpr ConfigRow<BackwardConfig> kBackwardLargeScores[] = {
    {64, {64, 128, 4, 2, 4, false, true, false, 2, 2}},
    {128, {64, 128, 4, 2, 2, true, false, false, 2, 2}},
    {256, {64, 64, 2, 4, 2, true, false, true, 1, 1}},
};
inline constexpr ConfigRow<BackwardConfig> kBackwardSmallScores[] = {
    {64, {64, 128, 4, 2, 4, false, false, false, 2, 2}},
    {128, {32, 128, 8, 1, 2, false, true, false, 2, 2}},
    {256, {32, 64, 4, 2, 2, true, true, true, 1, 1, 2}},
};
consteval BackwardConfig backward_config(int head_dim, Memory memory,
                                         Variant variant = Variant::kPlain) {
  const bool large = memory == Memory::kLarge;
  return variant == Variant::kPlain
             ? find_row(large ? kBackwardLarge : kBackwardSmall, head_dim)
             : find_row(large ? kBackwardLargeScores : kBackwardSmallScores, head_dim);
}

// How dQ is added to the fp32 dQ on sm_90a.
enum class DqPath {
  kRedV4,       // out of registers, by the warpgroups that compute
  kBulkReduce,  // through shared memory, by a warp for each of them
};

// The backward for sm_90a: two warpgroups compute and one loads. With 128 keys each has half of
// them; with 64 they share the products (backward/sm90_roles.cuh), for dK and dV of more than 128
// columns fill the registers.
struct BackwardConfigSm90 {
  int block_q, block_k;
  int stages;  // blocks of Q and dO in shared memory
  DqPath dq_path;
};

inline constexpr ConfigRow<BackwardConfigSm90> kBackwardSm90[] = {
    {64, {128, 128, 2, DqPath::kBulkReduce}}, {96, {64, 128, 2, DqPath::kBulkReduce}},
    {128, {64, 128, 2, DqPath::kBulkReduce}}, {192, {64, 64, 2, DqPath::kRedV4}},
    {256, {64, 64, 2, DqPath::kRedV4}},
};
// 64 queries at head dim 64, too: what scores do has no registers for 128.
inline constexpr ConfigRow<BackwardConfigSm90> kBackwardSm90Scores[] = {
    {64, {64, 128, 2, DqPath::kBulkReduce}},
    {128, {64, 128, 2, DqPath::kBulkReduce}},
    {256, {64, 64, 2, DqPath::kRedV4}},
};
consteval BackwardConfigSm90 backward_config_sm90(int head_dim, Variant variant = Variant::kPlain) {
  return variant == Variant::kPlain ? find_row(kBackwardSm90, head_dim)
                                    : find_row(kBackwardSm90Scores, head_dim);
}

}  // namespace flashtile
