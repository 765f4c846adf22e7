// The tile registers of AMX as the bf16 passes use them: eight tiles of 16 rows x 64 bytes, and one
// product, c += a b, of a 16 x 32 and a 32 x 16 matrix of bfloat16 with fp32 sums. The right
// operand holds two rows of the matrix in one: row k of the tile is [16 columns][rows 2k, 2k + 1].
//
// HardwareTiles executes the instructions ("Intel AMX instruction set reference": LDTILECFG,
// TILELOADD, TILESTORED, TDPBF16PS). EmulatedTiles computes the same in plain C++ on any processor,
// sums in the same order, so that the passes built on it can be tested where there is no AMX.
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

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
