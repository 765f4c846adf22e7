// Which elements dropout keeps: flashtile.h, flashtile_scores, has the generator and its layout.
// One call of Philox serves eight elements, two queries times four keys.
#pragma once

#include "params.h"
#include "storage.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

typedef uint64_t LongVec __attribute__((vector_size(kVecBytes)));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef uint8_t FourBytes __attribute__((vector_size(4)));

// The products of the even lanes' words with `factor`, 64 bits each.
FLASHTILE_INLINE LongVec multiply_even(LongVec words, uint32_t factor) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_maskz_mul_epu32(0xff, (__m512i)words, _mm512_set1_epi32((int)factor));
#elif defined(__AVX2__)
  return (LongVec)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi32((int)factor));
#else
  return (words & 0xffffffffu) * uint64_t{factor};
#endif
}

struct WideProduct {
  WordVec low, high;
};
FLASHTILE_INLINE WideProduct multiply_wide(WordVec words, uint32_t factor) {
  const LongVec even = multiply_even(bit_cast<LongVec>(words), factor);
  const LongVec odd = multiply_even(bit_cast<LongVec>(words) >> 32, factor);
  constexpr uint64_t kLow = 0xffffffffu;
  return {bit_cast<WordVec>((even & kLow) | (odd << 32)),
          bit_cast<WordVec>((even >> 32) | (odd & ~kLow))};
}

// Philox4x32-10 (Salmon et al., SC11).
struct Philox {
  static constexpr uint32_t kFactor[2] = {0xd2511f53, 0xcd9e8d57};
  static constexpr uint32_t kStep[2] = {0x9e3779b9, 0xbb67ae85};
  static constexpr int kRounds = 10;

  uint32_t key[2];

  struct Words {
    uint32_t of[4];
  };
  FLASHTILE_INLINE Words operator()(const Words& counter) const {
    Words c = counter;
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < kRounds; ++round, k0 += kStep[0], k1 += kStep[1]) {
      const uint64_t a = uint64_t{kFactor[0]} * c.of[0], b = uint64_t{kFactor[1]} * c.of[2];
      c = {{static_cast<uint32_t>(b >> 32) ^ c.of[1] ^ k0, static_cast<uint32_t>(b),
            static_cast<uint32_t>(a >> 32) ^ c.of[3] ^ k1, static_cast<uint32_t>(a)}};
    }
    return c;
  }

  // The same for a counter a lane.
  FLASHTILE_INLINE void operator()(WordVec (&c)[4]) const {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < kRounds; ++round, k0 += kStep[0], k1 += kStep[1]) {
      const WideProduct a = multiply_wide(c[0], kFactor[0]), b = multiply_wide(c[2], kFactor[1]);
      c[0] = b.high ^ c[1] ^ k0;
      c[2] = a.high ^ c[3] ^ k1;
      c[1] = b.low;
      c[3] = a.low;
    }
  }
};

// The elements of one query head of a sequence. A mask has a byte for an element, 255 where it is
// kept and 0 where it is dropped.
class DropMask {
 public:
  DropMask(const Dropout& dropout, int64_t sequence, int64_t head) : dropout_(dropout) {
    if (!dropout.exists() || dropout.rng_state == nullptr) return;
    const auto seed = static_cast<uint64_t>(dropout.rng_state[0]);
    const auto offset = static_cast<uint64_t>(dropout.rng_state[1]);
    const Philox of_seed = {{low(seed), high(seed)}};
    const Philox::Words words =
        of_seed({{low(offset), high(offset), low(static_cast<uint64_t>(head)),
                  low(static_cast<uint64_t>(sequence))}});
    philox_ = {{words.of[0], words.of[1]}};
    third_ = words.of[2];
    fourth_ = words.of[3];
  }
  bool exists() const { return dropout_.exists(); }

  // Rows are queries: [queries rounded up to 16][stride], from query q0 and key k0 on, multiples of
  // 16. Writes up to `keys` rounded up to 16.
  void fill(int64_t q0, int64_t queries, int64_t k0, int64_t keys, int64_t stride,
            uint8_t* to) const {
    for (int64_t i = 0; i < queries; i += 16) {
      for (int64_t lane = 0; lane < 8; ++lane) {
        uint8_t* const rows[2] = {to + (i + lane) * stride, to + (i + lane + 8) * stride};
        fill_rows(q0 + i + lane, k0, keys, rows);
      }
    }
  }
  // One row of it; `spare` has room for another.
  void fill_row(int64_t query, int64_t k0, int64_t keys, uint8_t* to, uint8_t* spare) const {
    const bool upper = query / 8 % 2 != 0;
    uint8_t* const rows[2] = {upper ? spare : to, upper ? to : spare};
    fill_rows(query, k0, keys, rows);
  }

  // The same with rows that are keys: [keys rounded up to 16][stride].
  void fill_transposed(int64_t q0, int64_t queries, int64_t k0, int64_t keys, int64_t stride,
                       uint8_t* to) const {
    constexpr int kWidth = kLanes<float>;
    for (int64_t group = 0; group < round_up(keys, 16) / 4; ++group) {
      const int64_t key = group / 4 * 16 + group % 4 * 2;
      for (int64_t n = 0; n < round_up(queries, 16) / 2; n += kWidth) {
        WordVec words[4] = {
            WordVec{} + static_cast<uint32_t>(k0 / 4 + group),
            bit_cast<WordVec>(lane_numbers<float>()) + static_cast<uint32_t>(q0 / 2 + n),
            WordVec{} + third_, WordVec{} + fourth_};
        philox_(words);
        for (int w = 0; w < 4; ++w) {
          uint8_t* const row = to + (key + w / 2 + w % 2 * 8) * stride;
          for (int lane = 0; lane < kWidth; lane += 4) {
            const int64_t query = (n + lane) / 8 * 16 + (n + lane) % 8;
            if (query >= round_up(queries, 16)) break;
            const FourWords bits = four_of(words[w], lane);
            keep(bits & 0xffffu, row + query);
            keep(bits >> 16, row + query + 8);
          }
        }
      }
    }
  }

 private:
  static uint32_t low(uint64_t n) { return static_cast<uint32_t>(n); }
  static uint32_t high(uint64_t n) { return static_cast<uint32_t>(n >> 32); }

  FLASHTILE_INLINE static FourWords four_of(WordVec words, int lane) {
    uint32_t all[kLanes<float>];
    __builtin_memcpy(all, &words, sizeof all);
    FourWords four;
    __builtin_memcpy(&four, all + lane, sizeof four);
    return four;
  }
  FLASHTILE_INLINE void keep(FourWords bits, uint8_t* to) const {
    const FourBytes bytes =
        __builtin_convertvector((FourWords)(bits >= dropout_.threshold), FourBytes);
    __builtin_memcpy(to, &bytes, sizeof bytes);
  }

  // The rows of a query in the lower half of its 16 and of the one 8 behind it.
  void fill_rows(int64_t query, int64_t k0, int64_t keys, uint8_t* const (&rows)[2]) const {
    constexpr int kWidth = kLanes<float>;
    const auto second = static_cast<uint32_t>(query / 16 * 8 + query % 8);
    for (int64_t n = 0; n < round_up(keys, 16) / 4; n += kWidth) {
      WordVec words[4] = {
          bit_cast<WordVec>(lane_numbers<float>()) + static_cast<uint32_t>(k0 / 4 + n),
          WordVec{} + second, WordVec{} + third_, WordVec{} + fourth_};
      philox_(words);
      for (int lane = 0; lane < kWidth; lane += 4) {
        const int64_t key = (n + lane) * 4;
        if (key >= round_up(keys, 16)) break;
        for (int eight = 0; eight < 2; ++eight) {
          const FourWords even = four_of(words[eight], lane), odd = four_of(words[eight + 2], lane);
          const FourWords first = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
          const FourWords last = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
          for (int half = 0; half < 2; ++half) {
            keep(first >> (16 * half) & 0xffffu, rows[half] + key + eight * 8);
            keep(last >> (16 * half) & 0xffffu, rows[half] + key + eight * 8 + 4);
          }
        }
      }
    }
  }

  const Dropout dropout_;
  Philox philox_ = {};
  uint32_t third_ = 0, fourth_ = 0;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
