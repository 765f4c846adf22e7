// Packing of bfloat16 rows into the operands of tiles.h. Bits are moved, numbers are not touched.
#pragma once

#include "pack.h"
#include "softmax.h"
#include "tiles.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// Rows and columns come in blocks of two tiles.
constexpr int64_t kTilePair = 2 * kTileSide;

FLASHTILE_INLINE Range whole_tiles(const Range& range) {
  if (range.empty()) return range;
  return {round_down(range.begin, kTilePair), round_up(range.end, kTilePair)};
}

inline void flip_signs(BFloat16* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) numbers[i].bits ^= 0x8000u;
}

// kLanes<float> words of two bfloat16, zeros behind `count` bfloat16.
FLASHTILE_INLINE Vec<float> read_pairs(const BFloat16* from, int64_t count) {
  Vec<float> pairs{};
  if (count >= 2 * kLanes<float>) {
    __builtin_memcpy(&pairs, from, sizeof pairs);
  } else if (count > 0) {
    __builtin_memcpy(&pairs, from, static_cast<size_t>(count) * sizeof *from);
  }
  return pairs;
}

// A left operand: `count` rows, zero rows up to a multiple of 32, zeros up to the stride.
inline void pack_left(Rows<const BFloat16> rows, int64_t count, int64_t dim, const TileRows& to) {
  for (int64_t r = 0; r < round_up(count, kTilePair); ++r) {
    const int64_t wanted = r < count ? dim : 0;
    BFloat16* row = to.row(r);
    if (wanted > 0) __builtin_memcpy(row, rows.row(r), static_cast<size_t>(wanted) * 2);
    __builtin_memset(row + wanted, 0, static_cast<size_t>(to.stride - wanted) * 2);
  }
}

// A right operand whose columns are the rows: `to` is to.depth (head_dim padded) x round_up(count,
// 32).
template <class Source = Rows<const BFloat16>>
inline void pack_right_transposed(Source rows, int64_t count, int64_t dim, const TilePanels& to) {
  constexpr int kWidth = kLanes<float>;
  for (int64_t c = 0; c < round_up(count, kTilePair); c += kWidth) {
    for (int64_t d = 0; d < to.depth; d += 2 * kWidth) {
      Vec<float> square[kWidth];
      BFloat16* const panel = to.at(d, round_down(c, kTileSide)) + c % kTileSide * 2;
      if (c + kWidth <= count && d + 2 * kWidth <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) square[i] = read_pairs(rows.row(c + i) + d, 2 * kWidth);
        transpose<float>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          store(reinterpret_cast<float*>(panel + i * 2 * kTileSide), square[i]);
        continue;
      }
      for (int i = 0; i < kWidth; ++i) {
        square[i] = c + i < count ? read_pairs(rows.row(c + i) + d, dim - d) : Vec<float>{};
      }
      transpose<float>(square);
      const int64_t wanted = smaller_of(kWidth, (to.depth - d) / 2);
      for (int i = 0; i < wanted; ++i)
        store(reinterpret_cast<float*>(panel + i * 2 * kTileSide), square[i]);
    }
  }
}

// One row of 16-bit numbers, as words, zeros behind `count`.
FLASHTILE_INLINE WordVec read_words(const BFloat16* from, int64_t count) {
  if (count >= kLanes<float>) return load_shorts(from);
  BFloat16 part[kLanes<float>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load_shorts(part);
}

// A right operand whose rows are the rows: `to` is round_up(count, 32) x round_up(dim, 32).
template <class Source = Rows<const BFloat16>>
inline void pack_right(Source rows, int64_t count, int64_t dim, const TilePanels& to) {
  constexpr int kWidth = kLanes<float>;
  for (int64_t r = 0; r < round_up(count, kTilePair); r += 2) {
    for (int64_t d = 0; d < round_up(dim, kTilePair); d += kWidth) {
      const WordVec low = r < count ? read_words(rows.row(r) + d, dim - d) : WordVec{};
      const WordVec high = r + 1 < count ? read_words(rows.row(r + 1) + d, dim - d) : WordVec{};
      BFloat16* panel = to.at(r, round_down(d, kTileSide)) + d % kTileSide * 2;
      const WordVec both = low | (high << 16);
      __builtin_memcpy(panel, &both, sizeof both);
    }
  }
}

// A left operand whose rows are the columns: `to` has round_up(dim, 32) rows of to.stride >= count.
inline void pack_left_transposed(Rows<const BFloat16> rows, int64_t count, int64_t dim,
                                 const TileRows& to) {
  for (int64_t d = 0; d < round_up(dim, kTilePair); ++d) {
    for (int64_t r = 0; r < to.stride; ++r) {
      to.row(d)[r] = r < count && d < dim ? rows.row(r)[d] : BFloat16{0};
    }
  }
}

// Whether no number of the rows is inf or NaN.
template <class Source = Rows<const BFloat16>>
inline bool all_finite(Source rows, int64_t count, int64_t dim) {
  WordVec found{};
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < dim; d += kLanes<float>) {
      found |= bit_cast<WordVec>((read_words(rows.row(r) + d, dim - d) & 0x7f80u) == 0x7f80u);
    }
  }
  bool finite = true;
  for (int i = 0; i < kLanes<float>; ++i) finite = finite && found[i] == 0;
  return finite;
}

FLASHTILE_INLINE float value_of(BFloat16 number) {
  return bit_cast<float>(uint32_t{number.bits} << 16);
}

// to[0..columns) += sum over `rows` of left[row] * right[row]: like a product of tiles that reads
// nothing but these rows, and with `skips_zeros` not those that meet a 0. Slow.
inline void add_products(const BFloat16* left, const Range& rows, const TilePanels& right,
                         int64_t columns, float* to, bool skips_zeros) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (skips_zeros && value_of(left[r]) == 0) continue;
      const BFloat16* pair = right.at(round_down(r, 2), round_down(c, kTileSide));
      to[c] += value_of(left[r]) * value_of(pair[c % kTileSide * 2 + r % 2]);
    }
  }
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
