// Reading what scores meet: biases and masks, for one warp's tile of scores.
//
// A warp reads pairs of numbers where its tile lies inside the tensor, columns are neighbours and
// pairs are aligned; else one number at a time, each tested, so that nothing is read that the
// tensor does not have.
#pragma once

#include "../params.h"
#include "../ptx/bits.cuh"
#include "../ptx/global.cuh"
#include "accumulator.cuh"
#include "constants.cuh"
#include "unpack.cuh"

namespace flashtile {

// Calls f with a value of the numbers' type.
template <class F>
FLASHTILE_DEVICE void with_numbers(const ScoreView& view, const F& f) {
  if (view.dtype == Dtype::kFloat32) {
    f(float());
  } else if (view.dtype == Dtype::kFloat16) {
    f(__half());
  } else {
    f(__nv_bfloat16());
  }
}
FLASHTILE_DEVICE int64_t number_bytes(const ScoreView& view) {
  return view.dtype == Dtype::kFloat32 ? 4 : view.dtype >= Dtype::kBool ? 1 : 2;
}

template <class N>
FLASHTILE_DEVICE float number_or_zero(const char* at, bool exists) {
  if constexpr (sizeof(N) == 4) {
    return ptx::ldg_f32_or_zero(at, exists);
  } else {
    return unpack<N>(ptx::ldg_u16_or_zero(at, exists)).x;
  }
}
template <class N>
FLASHTILE_DEVICE float2 number_pair(const char* at) {
  if constexpr (sizeof(N) == 4) {
    return ptx::ldg_f32x2(at);
  } else {
    return unpack<N>(ptx::ldg_u32(at));
  }
}
FLASHTILE_DEVICE float number_of(const ScoreView& view, int64_t offset, bool exists = true) {
  const char* const at = static_cast<const char*>(view.data) + offset * number_bytes(view);
  float x = 0.0f;
  with_numbers(view, [&]<class N>(N) { x = number_or_zero<N>(at, exists); });
  return x;
}

// Where the numbers of a warp's tile lie. `Rows` has first(r), the address of the lane's first
// number in its row r, which is 8 r rows below its first one, and exists(r).
template <class Rows>
struct ScoreBlock {
  Rows rows;
  int64_t column_bytes;  // from column to column
  int columns;           // of the tensor, from the lane's first one on
  bool whole;            // the warp's tile lies inside the tensor

  // Whether pairs of columns can be read.
  FLASHTILE_DEVICE bool has_pairs(int bytes) const {
    return whole && column_bytes == bytes && rows.are_multiples_of(2 * bytes);
  }
};

// One of a lane's elements: f(x, column) of all in its row `r`.
template <int kRows, int kKeys, class F>
FLASHTILE_DEVICE void for_row(Accumulator<kRows, kKeys>& s, int r, const F& f) {
  FLASHTILE_UNROLL
  for (int n = 0; n < s.kColBlocks; ++n) {
    FLASHTILE_UNROLL
    for (int i = 0; i < 2; ++i) f(s.d[r / 2][n][r % 2 * 2 + i], 8 * n + i);
  }
}

// Calls f(r) for each of a lane's rows, which stands as row 0 then: for code that is long and
// seldom runs, and of which there is one copy so.
template <int kRows, int kKeys, class F>
FLASHTILE_DEVICE void turn_rows(Accumulator<kRows, kKeys>& s, const F& f) {
  FLASHTILE_ROLL
  for (int r = 0; r < kRows / 8; ++r) {
    f(r);
    Accumulator<kRows, kKeys> turned;
    FLASHTILE_UNROLL
    for (int to = 0; to < kRows / 8; ++to) {
      const int from = (to + 1) % (kRows / 8);
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n) {
        FLASHTILE_UNROLL
        for (int i = 0; i < 2; ++i)
          turned.d[to / 2][n][to % 2 * 2 + i] = s.d[from / 2][n][from % 2 * 2 + i];
      }
    }
    s = turned;
  }
}

// s += factor * the numbers.
template <class N, int kRows, int kKeys, class Rows>
FLASHTILE_DEVICE void add_pairs(Accumulator<kRows, kKeys>& s, const Rows& rows, float factor) {
  FLASHTILE_UNROLL
  for (int r = 0; r < kRows / 8; ++r) {
    const char* const first = rows.first(r);
    FLASHTILE_UNROLL
    for (int n = 0; n < s.kColBlocks; ++n) {
      const float2 x = number_pair<N>(first + n * 8 * static_cast<int>(sizeof(N)));
      float* const d = s.d[r / 2][n] + r % 2 * 2;
      d[0] = fmaf(x.x, factor, d[0]);
      d[1] = fmaf(x.y, factor, d[1]);
    }
  }
}
template <class N, int kRows, int kKeys, class Rows>
FLASHTILE_DEVICE void add_row(Accumulator<kRows, kKeys>& s, const ScoreBlock<Rows>& block, int r,
                              float factor) {
  const char* const first = block.rows.first(r);
  const int columns = block.rows.exists(r) ? block.columns : 0;
  for_row(s, 0, [&](float& x, int column) {
    const float y = number_or_zero<N>(first + column * block.column_bytes, column < columns);
    x = fmaf(y, factor, x);
  });
}
template <int kRows, int kKeys, class Rows>
FLASHTILE_DEVICE void add_bias(Accumulator<kRows, kKeys>& s, const ScoreView& view,
                               const ScoreBlock<Rows>& block, float factor = kLog2e) {
  if (block.has_pairs(static_cast<int>(number_bytes(view)))) {
    with_numbers(view, [&]<class N>(N) { add_pairs<N>(s, block.rows, factor); });
  } else {
    turn_rows(s, [&](int r) {
      with_numbers(view, [&]<class N>(N) { add_row<N>(s, block, r, factor); });
    });
  }
}

// Scores of keys whose byte is 0 become -inf.
template <int kRows, int kKeys, class Rows>
FLASHTILE_DEVICE void hide_by_bytes(Accumulator<kRows, kKeys>& s, const ScoreBlock<Rows>& block) {
  if (block.has_pairs(1)) {
    FLASHTILE_UNROLL
    for (int r = 0; r < kRows / 8; ++r) {
      const char* const first = block.rows.first(r);
      FLASHTILE_UNROLL
      for (int n = 0; n < s.kColBlocks; ++n) {
        const uint32_t pair = ptx::ldg_u16(first + 8 * n);
        float* const d = s.d[r / 2][n] + r % 2 * 2;
        if ((pair & 0xff) == 0) d[0] = negative_infinity();
        if ((pair & 0xff00) == 0) d[1] = negative_infinity();
      }
    }
    return;
  }
  turn_rows(s, [&](int r) {
    const char* const first = block.rows.first(r);
    const int columns = block.rows.exists(r) ? block.columns : 0;
    for_row(s, 0, [&](float& x, int column) {
      const bool exists = column < columns;
      if (ptx::ldg_u8_or_zero(first + column * block.column_bytes, exists) == 0)
        x = negative_infinity();
    });
  });
}

// 32 bits from bit `bit` of the bytes at `first` on, of which the first `bits` exist; the others
// are 0.
FLASHTILE_DEVICE uint32_t load_bits(const char* first, int bit, int bits) {
  const int byte = bit >> 3;
  uint64_t all = 0;
  FLASHTILE_UNROLL
  for (int i = 0; i < 5; ++i) {
    const bool exists = 8 * (byte + i) < bits;
    all |= uint64_t{ptx::ldg_u8_or_zero(first + byte + i, exists)} << (8 * i);
  }
  const auto word = static_cast<uint32_t>(all >> (bit & 7));
  const int count = max(bits - bit, 0);
  return count >= 32 ? word : word & ~ptx::shift_left(0xffffffffu, count);
}

// The same for a mask of bits: rows begin at bit 0, and the lane's first column is `bit`. `bits`:
// how many a row has.
template <int kRows, int kKeys, class Rows>
FLASHTILE_DEVICE void hide_by_bits(Accumulator<kRows, kKeys>& s, const Rows& rows, int bit,
                                   int bits) {
  turn_rows(s, [&](int r) {
    const char* const first = rows.first(r);
    uint32_t words[(kKeys + 31) / 32];
    FLASHTILE_UNROLL
    for (int i = 0; i < (kKeys + 31) / 32; ++i)
      words[i] = load_bits(first, bit + 32 * i, rows.exists(r) ? bits : 0);
    for_row(s, 0, [&](float& x, int column) {
      if ((words[column / 32] >> (column % 32) & 1) == 0) x = negative_infinity();
    });
  });
}

}  // namespace flashtile
