// The formats that tensors are stored in, read into and written from vectors of the type that the
// arithmetic uses: double for double, float for the rest.
//
// Conversions to float16 and bfloat16 round to nearest even. None of them makes a float denormal on
// the way, so they are exact with denormals switched off.
#pragma once

#include "vec.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeType<T>::Type;

// Numbers of query rows, fp32 or fp64: log-sum-exps and their gradients.
struct RowValues {
  void* data;  // null: absent
  bool is_double;

  bool exists() const { return data != nullptr; }
  double get(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  void set(int64_t i, double value) const {
    if (is_double) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
  RowValues from(int64_t i) const {
    if (data == nullptr) return *this;
    return {static_cast<char*>(data) + i * (is_double ? 8 : 4), is_double};
  }
};

typedef uint16_t ShortVec __attribute__((vector_size(kVecBytes / 2)));  // kLanes<float> of 16 bits
typedef uint32_t WordVec __attribute__((vector_size(kVecBytes)));

#if defined(__AVX512F__)
// The forms with a mask: the plain ones read an uninitialised variable in GCC 12's header.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Conversions between 16-bit and 32-bit integers; the compilers' own are slow with AVX2.
FLASHTILE_INLINE WordVec load_shorts(const void* from) {
#if defined(__AVX512F__)
  return (WordVec)_mm512_maskz_cvtepu16_epi32(
      kAllLanes, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (WordVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  ShortVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, WordVec);
#endif
}

FLASHTILE_INLINE void store_shorts(void* to, WordVec words) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)words));
#elif defined(__AVX2__)
  const __m256i both = (__m256i)words;
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  _mm_storeu_si128(static_cast<__m128i*>(to), packed);
#else
  const ShortVec v = __builtin_convertvector(words, ShortVec);
  __builtin_memcpy(to, &v, sizeof v);
#endif
}

FLASHTILE_INLINE Vec<float> read(const float* from) { return load(from); }
FLASHTILE_INLINE Vec<double> read(const double* from) { return load(from); }
FLASHTILE_INLINE void write(float* to, Vec<float> v) { store(to, v); }
FLASHTILE_INLINE void write(double* to, Vec<double> v) { store(to, v); }

FLASHTILE_INLINE Vec<float> read(const BFloat16* from) {
  return bit_cast<Vec<float>>(load_shorts(from) << 16);
}

FLASHTILE_INLINE WordVec bfloat16_bits(Vec<float> v) {
  const WordVec bits = bit_cast<WordVec>(v);
  const WordVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordVec quiet_nan = bits | 0x400000u;
  return (bit_cast<WordVec>(v == v) ? rounded : quiet_nan) >> 16;
}

FLASHTILE_INLINE void write(BFloat16* to, Vec<float> v) { store_shorts(to, bfloat16_bits(v)); }

FLASHTILE_INLINE Vec<float> read(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAllLanes,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const WordVec half = load_shorts(from);
  const WordVec magnitude = (half & 0x7fffu) << 13;
  const WordVec exponent = half & 0x7c00u;
  const WordVec normal = magnitude + (112u << 23);
  const WordVec special = magnitude + (224u << 23);  // inf and NaN
  const Vec<float> one = bit_cast<Vec<float>>(WordVec{} + (113u << 23));
  const WordVec tiny = bit_cast<WordVec>(bit_cast<Vec<float>>(magnitude + (113u << 23)) - one);
  const WordVec value = exponent == 0x7c00u ? special : (exponent == 0u ? tiny : normal);
  return bit_cast<Vec<float>>(value | ((half & 0x8000u) << 16));
#endif
}

FLASHTILE_INLINE void write(Half* to, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(kAllLanes, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const WordVec bits = bit_cast<WordVec>(v);
  const WordVec magnitude = bits & 0x7fffffffu;
  const WordVec odd = (magnitude >> 13) & 1u;
  const WordVec normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const WordVec half_ulp = WordVec{} + (126u << 23);  // 0.5: adding it rounds to multiples of 2^-24
  const WordVec tiny =
      bit_cast<WordVec>(bit_cast<Vec<float>>(magnitude) + bit_cast<Vec<float>>(half_ulp)) -
      half_ulp;
  const WordVec special = magnitude > (255u << 23) ? WordVec{} + 0x7e00u : WordVec{} + 0x7c00u;
  const WordVec finite = magnitude < (113u << 23) ? tiny : normal;
  store_shorts(to, (magnitude >= (143u << 23) ? special : finite) | ((bits >> 16) & 0x8000u));
#endif
}

// The first `count` lanes from memory, zeros behind them; nothing past `count` is touched.
template <class T>
FLASHTILE_INLINE Vec<Compute<T>> read_some(const T* from, int64_t count) {
  constexpr int kWidth = kLanes<Compute<T>>;
  if (count >= kWidth) return read(from);
  if (count <= 0) return Vec<Compute<T>>{};
  T part[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return read(part);
}

template <class T>
FLASHTILE_INLINE void write_some(T* to, Vec<Compute<T>> v, int64_t count) {
  constexpr int kWidth = kLanes<Compute<T>>;
  if (count >= kWidth) {
    write(to, v);
    return;
  }
  T part[kWidth];
  write(part, v);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// to[0..padded) = factor * from[0..count), zeros behind; padded is a multiple of the vector width.
template <class T>
FLASHTILE_INLINE void widen(const T* from, int64_t count, Compute<T> factor, Compute<T>* to,
                            int64_t padded) {
  constexpr int kWidth = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, read(from + i) * factor);
  for (; i < padded; i += kWidth) store(to + i, read_some(from + i, count - i) * factor);
}

// to[0..count) = factor * from[0..count).
template <class T>
FLASHTILE_INLINE void narrow(const Compute<T>* from, int64_t count, Compute<T> factor, T* to) {
  constexpr int kWidth = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) write(to + i, load(from + i) * factor);
  if (i < count) write_some(to + i, load(from + i) * factor, count - i);
}

template <class T>
FLASHTILE_INLINE Compute<T> dot(const T* a, const T* b, int64_t count) {
  using C = Compute<T>;
  Vec<C> sum{};
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    sum += read_some(a + i, count - i) * read_some(b + i, count - i);
  }
  return sum_of_lanes<C>(sum);
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
