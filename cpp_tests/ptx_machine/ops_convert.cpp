// cvt between integers, fp16, bf16, fp32 and fp64.
#include <limits>

#include "half.h"
#include "ops.h"

namespace ptx {

namespace {

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, int8_t>)
    return "s8";
  else if constexpr (std::is_same_v<T, uint8_t>)
    return "u8";
  else if constexpr (std::is_same_v<T, int16_t>)
    return "s16";
  else if constexpr (std::is_same_v<T, uint16_t>)
    return "u16";
  else if constexpr (std::is_same_v<T, int32_t>)
    return "s32";
  else if constexpr (std::is_same_v<T, uint32_t>)
    return "u32";
  else if constexpr (std::is_same_v<T, int64_t>)
    return "s64";
  else if constexpr (std::is_same_v<T, uint64_t>)
    return "u64";
  else if constexpr (std::is_same_v<T, float>)
    return "f32";
  else
    return "f64";
}

// Registers may be wider than the source type: letters of the registers that hold at least T.
template <class T>
std::string letters_of() {
  return sizeof(T) == 8 ? "d" : sizeof(T) == 4 ? "rd" : "hrd";
}

// D from S, where the source register stores R lanes and the result's register W lanes.
template <class D, class S, class W, class R>
void convert_integer(Warp& warp, const Inst& inst, uint32_t mask) {
  const R* from = warp.at<const R>(inst.operand[1]);
  alignas(64) W result[kLanes];
  using Extended = std::conditional_t<std::is_signed_v<D>, std::make_signed_t<W>, W>;
  for (int l = 0; l < kLanes; ++l) {
    const D value = static_cast<D>(static_cast<S>(from[l]));
    if constexpr (sizeof(D) <= 2 && sizeof(W) == 4) {
      result[l] = sizeof(D) == 2 ? static_cast<uint16_t>(value)
                                 : static_cast<uint16_t>(static_cast<Extended>(value));
    } else {
      result[l] = static_cast<W>(static_cast<Extended>(value));
    }
  }
  store_lanes(warp.at<W>(inst.operand[0]), result, mask);
}

template <class D, class S>
void add_integer_pair(OpTable& t) {
  const std::string name = std::string("cvt.") + type_name<D>() + "." + type_name<S>();
  const std::string results = sizeof(D) == 1 ? "h" : std::string(1, letter_of<D>());
  using W = std::conditional_t<sizeof(D) == 8, uint64_t, uint32_t>;
  for (const char result : results) {
    for (const char source : letters_of<S>()) {
      const std::string signature = {result, '=', source};
      t.add(
          name, signature,
          source == 'd' ? convert_integer<D, S, W, uint64_t> : convert_integer<D, S, W, uint32_t>);
    }
  }
}

template <class D, class... S>
void add_integer_row(OpTable& t) {
  (add_integer_pair<D, S>(t), ...);
}
template <class... D>
void add_integer_table(OpTable& t) {
  (add_integer_row<D, int8_t, uint8_t, int16_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t>(t),
   ...);
}

enum class Round { kNearest, kZero, kDown, kUp };

template <Round kRound, class F>
F round_to_integral(F x) {
  if constexpr (kRound == Round::kNearest)
    return std::nearbyint(x);
  else if constexpr (kRound == Round::kZero)
    return std::trunc(x);
  else if constexpr (kRound == Round::kDown)
    return std::floor(x);
  else
    return std::ceil(x);
}

// Saturating; NaN gives 0.
template <Round kRound, class D, class F>
D to_integer(F x) {
  if (x != x) return 0;
  const F r = round_to_integral<kRound>(x);
  constexpr D kMin = std::numeric_limits<D>::min();
  constexpr D kMax = std::numeric_limits<D>::max();
  if (r <= static_cast<F>(kMin)) return kMin;
  if (r >= static_cast<F>(kMax)) return kMax;
  return static_cast<D>(r);
}

template <class D, class F>
void add_to_integer(OpTable& t) {
  const std::string types = std::string(".") + type_name<D>() + "." + type_name<F>();
  const auto add = [&]<Round kRound>(const char* round, std::integral_constant<Round, kRound>) {
    add_map_float<false, to_integer<kRound, D, F>, D, F>(t, std::string("cvt.") + round + types);
    if constexpr (sizeof(F) == 4) {
      add_map_float<true, to_integer<kRound, D, F>, D, F>(
          t, std::string("cvt.") + round + ".ftz" + types);
    }
  };
  add("rni", std::integral_constant<Round, Round::kNearest>{});
  add("rzi", std::integral_constant<Round, Round::kZero>{});
  add("rmi", std::integral_constant<Round, Round::kDown>{});
  add("rpi", std::integral_constant<Round, Round::kUp>{});
}

template <class F, class S>
void add_from_integer(OpTable& t) {
  const std::string name = std::string("cvt.rn.") + type_name<F>() + "." + type_name<S>();
  add_map_float<false, [](S x) { return static_cast<F>(x); }, F, S>(t, name);
  if constexpr (sizeof(S) == 1) {
    add_map_float<false, [](uint32_t x) { return static_cast<F>(static_cast<S>(x)); }, F, uint32_t>(
        t, name);
  }
}

template <class F>
void add_float_integer(OpTable& t) {
  add_to_integer<int16_t, F>(t);
  add_to_integer<uint16_t, F>(t);
  add_to_integer<int32_t, F>(t);
  add_to_integer<uint32_t, F>(t);
  add_to_integer<int64_t, F>(t);
  add_to_integer<uint64_t, F>(t);
  add_from_integer<F, int8_t>(t);
  add_from_integer<F, uint8_t>(t);
  add_from_integer<F, int16_t>(t);
  add_from_integer<F, uint16_t>(t);
  add_from_integer<F, int32_t>(t);
  add_from_integer<F, uint32_t>(t);
  add_from_integer<F, int64_t>(t);
  add_from_integer<F, uint64_t>(t);
}

float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <bool kFtz>
void add_integral_f32(OpTable& t, const std::string& ftz) {
  using F = float;
  add_map_float<kFtz, round_to_integral<Round::kNearest, F>, F, F>(t, "cvt.rni" + ftz + ".f32.f32");
  add_map_float<kFtz, round_to_integral<Round::kZero, F>, F, F>(t, "cvt.rzi" + ftz + ".f32.f32");
  add_map_float<kFtz, round_to_integral<Round::kDown, F>, F, F>(t, "cvt.rmi" + ftz + ".f32.f32");
  add_map_float<kFtz, round_to_integral<Round::kUp, F>, F, F>(t, "cvt.rpi" + ftz + ".f32.f32");
  add_map_float<kFtz, saturate, F, F>(t, "cvt" + ftz + ".sat.f32.f32");
  add_map_float<kFtz, [](F x) { return static_cast<double>(x); }, double, F>(
      t, "cvt" + ftz + ".f64.f32");
  add_map_float<kFtz, [](double x) { return static_cast<F>(x); }, F, double>(
      t, "cvt.rn" + ftz + ".f32.f64");
}

template <class H>
uint16_t truncate(float x) {  // toward zero: one below where the nearest went away
  const uint16_t nearest = H::narrow(x);
  if (x != x || std::fabs(H::widen(nearest)) <= std::fabs(x)) return nearest;
  return static_cast<uint16_t>(nearest - 1);
}

template <class H>
uint16_t relu(float x) {
  const uint16_t r = H::narrow(x);
  return x != x ? r : ((r & 0x8000) ? 0 : r);
}

template <uint16_t (*kNarrow)(float)>
void add_narrow(OpTable& t, const std::string& round, const std::string& type) {
  using U = uint32_t;
  add_map_float<false, [](float x) { return kNarrow(x); }, uint16_t, float>(
      t, "cvt." + round + "." + type + ".f32");
  add_map_float<false,
                [](float high, float low) {
                  return static_cast<U>(kNarrow(high)) << 16 | static_cast<U>(kNarrow(low));
                },
                U, float, float>(t, "cvt." + round + "." + type + "x2.f32");
}

template <class H>
void add_half(OpTable& t, const std::string& type) {
  add_map_float<false, [](uint16_t x) { return H::widen(x); }, float, uint16_t>(t,
                                                                                "cvt.f32." + type);
  add_map_float<true, [](uint16_t x) { return H::widen(x); }, float, uint16_t>(
      t, "cvt.ftz.f32." + type);
  add_narrow<H::narrow>(t, "rn", type);
  add_narrow<truncate<H>>(t, "rz", type);
  add_narrow<relu<H>>(t, "rn.relu", type);
  add_map_float<false, [](uint16_t x) { return to_integer<Round::kZero, int32_t>(H::widen(x)); },
                int32_t, uint16_t>(t, "cvt.rzi.s32." + type);
}

}  // namespace

void add_convert_ops(OpTable& t) {
  add_integer_table<int8_t, uint8_t, int16_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t>(t);
  add_float_integer<float>(t);
  add_float_integer<double>(t);
  add_integral_f32<false>(t, "");
  add_integral_f32<true>(t, ".ftz");
  add_half<Fp16>(t, "f16");
  add_half<Bf16>(t, "bf16");
}

}  // namespace ptx
