// ldmatrix, stmatrix, movmatrix and mma.sync.
//
// A register of a fragment, seen as its 32 lanes side by side, is an 8x8 matrix of 16-bit elements
// in row order: lane 4r + c holds columns 2c and 2c+1 of row r. So fragments unpack without a
// shuffle.
#include "access.h"
#include "half.h"
#include "ops.h"

namespace ptx {

namespace {

template <int kCount, bool kTranspose>
void ldmatrix(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  Request r;
  r.warp = &warp;
  r.pc = warp.pc;
  r.mask = kCount == 4 ? kAllLanes : (1u << (8 * kCount)) - 1;
  r.bytes = 16;
  read_addresses(warp, inst.operand + kCount, r.address);
  resolve(r, Space::kShared);
  ++warp.block->counters->ldmatrix;
  for (int m = 0; m < kCount; ++m) {
    alignas(64) uint16_t out[64];
    for (int row = 0; row < 8; ++row) {
      uint16_t line[8];
      std::memcpy(line, r.host[8 * m + row], 16);
      for (int c = 0; c < 8; ++c) out[kTranspose ? 8 * c + row : 8 * row + c] = line[c];
    }
    std::memcpy(warp.at<char>(inst.operand[m]), out, sizeof(out));
  }
}

template <int kCount, bool kTranspose>
void stmatrix(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  Request r;
  r.warp = &warp;
  r.pc = warp.pc;
  r.mask = kCount == 4 ? kAllLanes : (1u << (8 * kCount)) - 1;
  r.bytes = 16;
  r.access = Access::kWrite;
  read_addresses(warp, inst.operand, r.address);
  resolve(r, Space::kShared);
  for (int m = 0; m < kCount; ++m) {
    const uint16_t* in = warp.at<const uint16_t>(inst.operand[3 + m]);
    for (int row = 0; row < 8; ++row) {
      uint16_t line[8];
      for (int c = 0; c < 8; ++c) line[c] = in[kTranspose ? 8 * c + row : 8 * row + c];
      std::memcpy(r.host[8 * m + row], line, 16);
    }
  }
}

void movmatrix(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  uint16_t out[64];
  const uint16_t* in = warp.at<const uint16_t>(inst.operand[1]);
  for (int i = 0; i < 64; ++i) out[8 * (i % 8) + i / 8] = in[i];
  std::memcpy(warp.at<char>(inst.operand[0]), out, sizeof(out));
}

// 64 elements of a fragment register as fp32.
template <class H>
void widen(const uint16_t* from, float* to) {
  for (int i = 0; i < 64; ++i) to[i] = H::widen(from[i]);
}
#if defined(__AVX2__) && defined(__F16C__)
template <>
void widen<Fp16>(const uint16_t* from, float* to) {
  for (int i = 0; i < 64; i += 8) {
    _mm256_store_ps(to + i,
                    _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}
#endif

// D = A B + C of m16n8kK, fp32 accumulation in order of k. Products of two halves are exact in
// fp32. Columns are kept as n = 0 2 4 6 1 3 5 7: then a row of C is lanes 4r .. 4r+3 of two
// registers.
template <class H, int kK>
void mma(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  set_ftz(false);
  constexpr int kHalves = kK / 8;  // 8x8 tiles along k
  const int32_t* o = inst.operand;
  alignas(32) float a[2 * kHalves][64];  // [k half][row half] tiles, [row][k]
  alignas(32) float b_rows[64];          // [n][k] of one tile
  alignas(32) float b[kK][8];            // [k][permuted n]
  alignas(32) float acc[16][8];          // [row][permuted n]
  for (int i = 0; i < 2 * kHalves; ++i) widen<H>(warp.at<const uint16_t>(o[4 + i]), a[i]);
  const int32_t* b_places = o + 4 + 2 * kHalves;
  for (int h = 0; h < kHalves; ++h) {
    widen<H>(warp.at<const uint16_t>(b_places[h]), b_rows);
    for (int j = 0; j < 8; ++j) {
      const int n = j < 4 ? 2 * j : 2 * j - 7;
      for (int k = 0; k < 8; ++k) b[8 * h + k][j] = b_rows[8 * n + k];
    }
  }
  const int32_t* c_places = b_places + kHalves;
  for (int half = 0; half < 2; ++half) {
    for (int odd = 0; odd < 2; ++odd) {
      const float* c = warp.at<const float>(c_places[2 * half + odd]);
      for (int row = 0; row < 8; ++row) std::memcpy(&acc[8 * half + row][4 * odd], c + 4 * row, 16);
    }
  }
  typedef float Row __attribute__((vector_size(32)));
  for (int row = 0; row < 16; ++row) {
    Row sum;
    std::memcpy(&sum, acc[row], sizeof(sum));
    for (int k = 0; k < kK; ++k) {
      Row bk;
      std::memcpy(&bk, b[k], sizeof(bk));
      sum += a[2 * (k / 8) + row / 8][8 * (row % 8) + k % 8] * bk;
    }
    std::memcpy(acc[row], &sum, sizeof(sum));
  }
  for (int half = 0; half < 2; ++half) {
    for (int odd = 0; odd < 2; ++odd) {
      float* d = warp.at<float>(o[2 * half + odd]);
      for (int row = 0; row < 8; ++row) std::memcpy(d + 4 * row, &acc[8 * half + row][4 * odd], 16);
    }
  }
  ++warp.block->counters->mma;
  warp.block->counters->mma_flops += 2 * 16 * 8 * kK;
}

template <int kCount>
void add_matrix_moves(OpTable& t, const std::string& count) {
  const std::string registers(kCount, 'r');
  for (const char* space : {".shared.b16", ".shared::cta.b16"}) {
    const std::string load = "ldmatrix.sync.aligned.m8n8." + count;
    const std::string store = "stmatrix.sync.aligned.m8n8." + count;
    t.add(load + space, registers + "=M", ldmatrix<kCount, false>);
    t.add(load + ".trans" + space, registers + "=M", ldmatrix<kCount, true>);
    t.add(store + space, "M" + registers, stmatrix<kCount, false>);
    t.add(store + ".trans" + space, "M" + registers, stmatrix<kCount, true>);
  }
}

}  // namespace

void add_matrix_ops(OpTable& t) {
  add_matrix_moves<1>(t, "x1");
  add_matrix_moves<2>(t, "x2");
  add_matrix_moves<4>(t, "x4");
  t.add("movmatrix.sync.aligned.m8n8.trans.b16", "r=r", movmatrix);
  const std::string m = "mma.sync.aligned.m16n8";
  t.add(m + "k16.row.col.f32.f16.f16.f32", "rrrr=rrrrrrrrrr", mma<Fp16, 16>);
  t.add(m + "k16.row.col.f32.bf16.bf16.f32", "rrrr=rrrrrrrrrr", mma<Bf16, 16>);
  t.add(m + "k8.row.col.f32.f16.f16.f32", "rrrr=rrrrrrr", mma<Fp16, 8>);
  t.add(m + "k8.row.col.f32.bf16.bf16.f32", "rrrr=rrrrrrr", mma<Bf16, 8>);
}

}  // namespace ptx
