// The tile registers of AMX as the bf16 passes use them: eight tiles of 16 rows x 64 bytes, and one
// product, c += a b, of a 16 x 32 and a 32 x 16 matrix of bfloat16 with fp32 sums. The right
// operand holds two rows of the matrix in one: row k of the tile is [16 columns][rows 2k, 2k + 1].
//
// HardwareTiles executes the instructions ("Intel AMX instruction set reference": LDTILECFG,
// TILELOADD, TILESTORED, TDPBF16PS). EmulatedTiles computes the same in plain C++ on any processor,
// sums in the same order, so that the passes built on it can be tested where there is no AMX.
// VectorTiles multiplies the same operands in vectors (AVX512-BF16: VDPBF16PS), in registers.
#pragma once

#include "storage.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kTileSide = 16;   // rows of a tile, columns of fp32
constexpr int64_t kTileDepth = 32;  // bfloat16 per row of a left operand

#if defined(__AMX_BF16__)

class HardwareTiles {
 public:
  HardwareTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg (%0)" : : "r"(&config) : "memory");
  }
  ~HardwareTiles() { asm volatile("tilerelease" : : : "memory"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(stride_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  void store(void* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(to), "r"(stride_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};
using Tiles = HardwareTiles;

#elif defined(__AVX512BF16__)

struct VectorTiles {};  // no state: multiply_tiles does it all
using Tiles = VectorTiles;

#else

class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    __builtin_memset(tile_[kTile], 0, sizeof tile_[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    for (int64_t r = 0; r < kTileSide; ++r) {
      __builtin_memcpy(tile_[kTile][r], static_cast<const char*>(from) + r * stride_bytes, 64);
    }
  }
  template <int kTile>
  void store(void* to, int64_t stride_bytes) {
    for (int64_t r = 0; r < kTileSide; ++r) {
      __builtin_memcpy(static_cast<char*>(to) + r * stride_bytes, tile_[kTile][r], 64);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void multiply() {
    for (int64_t m = 0; m < kTileSide; ++m) {
      for (int64_t k = 0; k < kTileDepth; ++k) {
        const float left = number(tile_[kLeft][m], k);
        for (int64_t n = 0; n < kTileSide; ++n) {
          float sum;
          __builtin_memcpy(&sum, tile_[kSum][m] + n * 4, 4);
          sum += left * number(tile_[kRight][k / 2], n * 2 + k % 2);
          __builtin_memcpy(tile_[kSum][m] + n * 4, &sum, 4);
        }
      }
    }
  }

 private:
  static float number(const uint8_t* row, int64_t i) {
    uint16_t bits;
    __builtin_memcpy(&bits, row + i * 2, 2);
    return bit_cast<float>(uint32_t{bits} << 16);
  }
  uint8_t tile_[8][kTileSide][64];
};
using Tiles = EmulatedTiles;

#endif

// A left operand: rows of bfloat16, padded with zeros to whole tiles.
struct TileRows {
  BFloat16* data;
  int64_t stride;  // elements
  FLASHTILE_INLINE BFloat16* row(int64_t r) const { return data + r * stride; }
};

// A right operand of `depth` rows: panels of 16 columns, panel[depth / 2][16][2], padded with
// zeros.
struct TilePanels {
  BFloat16* data;
  int64_t depth;
  FLASHTILE_INLINE BFloat16* at(int64_t row, int64_t column) const {
    return data + column * depth + row * kTileSide;
  }
};

// c[0..32)[0..32) = (kAdd ? c : 0) + a[0..32)[0..depth) * b[0..depth)[0..32), depth a multiple
// of 32.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// Eight rows of it: sixteen sums, more than the latency of two products a cycle asks for.
constexpr int kSumRows = 8;

template <bool kAdd>
[[gnu::noinline]] inline void multiply_rows(const TileRows& a, const TilePanels& b, int64_t depth,
                                            float* c, int64_t ldc) {
  __m512 sum[kSumRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r) sum[r][0] = sum[r][1] = Vec<float>{};
  const BFloat16* const left = b.at(0, 0);
  const BFloat16* const right = b.at(0, kTileSide);
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += 2) {
    const auto pairs0 =
        bit_cast<__m512bh>(load(reinterpret_cast<const float*>(left + k * kTileSide)));
    const auto pairs1 =
        bit_cast<__m512bh>(load(reinterpret_cast<const float*>(right + k * kTileSide)));
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a.row(r) + k, sizeof pair);
      const auto row = bit_cast<__m512bh>(IntVec<float>{} + pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, pairs0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, pairs1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* const to = c + r * ldc + v * kTileSide;
      store<float>(to, kAdd ? load(to) + Vec<float>(sum[r][v]) : Vec<float>(sum[r][v]));
    }
  }
}

template <bool kAdd>
FLASHTILE_INLINE void multiply_tiles(Tiles&, const TileRows& a, const TilePanels& b, int64_t depth,
                                     float* c, int64_t ldc) {
  for (int64_t r = 0; r < 2 * kTileSide; r += kSumRows) {
    multiply_rows<kAdd>({a.row(r), a.stride}, b, depth, c + r * ldc, ldc);
  }
}

// c[0..16)[0..32): the upper half of it.
template <bool kAdd>
FLASHTILE_INLINE void multiply_tile_row(Tiles&, const TileRows& a, const TilePanels& b,
                                        int64_t depth, float* c, int64_t ldc) {
  for (int64_t r = 0; r < kTileSide; r += kSumRows) {
    multiply_rows<kAdd>({a.row(r), a.stride}, b, depth, c + r * ldc, ldc);
  }
}

#else

template <bool kAdd>
FLASHTILE_INLINE void multiply_tiles(Tiles& tiles, const TileRows& a, const TilePanels& b,
                                     int64_t depth, float* c, int64_t ldc) {
  const int64_t c_bytes = ldc * 4;
  if constexpr (kAdd) {
    tiles.template load<0>(c, c_bytes);
    tiles.template load<1>(c + kTileSide, c_bytes);
    tiles.template load<2>(c + kTileSide * ldc, c_bytes);
    tiles.template load<3>(c + kTileSide * ldc + kTileSide, c_bytes);
  } else {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    tiles.template load<4>(a.row(0) + k, a.stride * 2);
    tiles.template load<6>(b.at(k, 0), 64);
    tiles.template load<7>(b.at(k, kTileSide), 64);
    tiles.template load<5>(a.row(kTileSide) + k, a.stride * 2);
    tiles.template multiply<0, 4, 6>();
    tiles.template multiply<1, 4, 7>();
    tiles.template multiply<2, 5, 6>();
    tiles.template multiply<3, 5, 7>();
  }
  tiles.template store<0>(c, c_bytes);
  tiles.template store<1>(c + kTileSide, c_bytes);
  tiles.template store<2>(c + kTileSide * ldc, c_bytes);
  tiles.template store<3>(c + kTileSide * ldc + kTileSide, c_bytes);
}

// c[0..16)[0..32): the upper half of it.
template <bool kAdd>
FLASHTILE_INLINE void multiply_tile_row(Tiles& tiles, const TileRows& a, const TilePanels& b,
                                        int64_t depth, float* c, int64_t ldc) {
  if constexpr (kAdd) {
    tiles.template load<0>(c, ldc * 4);
    tiles.template load<1>(c + kTileSide, ldc * 4);
  } else {
    tiles.template zero<0>();
    tiles.template zero<1>();
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    tiles.template load<4>(a.row(0) + k, a.stride * 2);
    tiles.template load<6>(b.at(k, 0), 64);
    tiles.template load<7>(b.at(k, kTileSide), 64);
    tiles.template multiply<0, 4, 6>();
    tiles.template multiply<1, 4, 7>();
  }
  tiles.template store<0>(c, ldc * 4);
  tiles.template store<1>(c + kTileSide, ldc * 4);
}

#endif

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
