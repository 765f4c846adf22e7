// Integer arithmetic, logic, shifts, bit fields.
#include "ops.h"

namespace ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
T wrap_add(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}

template <class T>
T mul_lo(T a, T b) {
  if constexpr (sizeof(T) == 2)
    return static_cast<T>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
  else
    return static_cast<T>(static_cast<Unsigned<T>>(a) * static_cast<Unsigned<T>>(b));
}

template <class T>
T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
}

template <class T>
struct WiderOf {
  using Type =
      std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                         std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
};

// Division by zero: all ones, as the hardware's sequence happens to give; INT_MIN / -1 wraps.
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(0 - static_cast<Unsigned<T>>(a));
  }
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}

template <class T>
void add_arithmetic(OpTable& t, const std::string& type) {
  add_map<[](T a, T b) { return wrap_add(a, b); }, T, T, T>(t, "add." + type);
  add_map<[](T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
  },
          T, T, T>(t, "sub." + type);
  add_map<mul_lo<T>, T, T, T>(t, "mul.lo." + type);
  add_map<mul_hi<T>, T, T, T>(t, "mul.hi." + type);
  add_map<[](T a, T b, T c) { return wrap_add(mul_lo(a, b), c); }, T, T, T, T>(t, "mad.lo." + type);
  add_map<[](T a, T b, T c) { return wrap_add(mul_hi(a, b), c); }, T, T, T, T>(t, "mad.hi." + type);
  add_map<divide<T>, T, T, T>(t, "div." + type);
  add_map<remainder<T>, T, T, T>(t, "rem." + type);
  add_map<[](T a, T b) { return a < b ? a : b; }, T, T, T>(t, "min." + type);
  add_map<[](T a, T b) { return (a > b) ? a : b; }, T, T, T>(t, "max." + type);
  if constexpr (std::is_signed_v<T>) {
    add_map<[](T a) { return static_cast<T>(0 - static_cast<Unsigned<T>>(a)); }, T, T>(
        t, "neg." + type);
    add_map<[](T a) { return a < 0 ? static_cast<T>(0 - static_cast<Unsigned<T>>(a)) : a; }, T, T>(
        t, "abs." + type);
  }
  if constexpr (sizeof(T) <= 4) {
    using W = typename WiderOf<T>::Type;
    add_map<[](T a, T b) { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); }, W, T,
            T>(t, "mul.wide." + type);
    add_map<[](T a, T b, W c) { return wrap_add<W>(static_cast<W>(a) * static_cast<W>(b), c); }, W,
            T, T, W>(t, "mad.wide." + type);
  }
}

template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> (n >= kBits ? kBits - 1 : n));
  else
    return n >= kBits ? T{0} : static_cast<T>(a >> n);
}

template <class U>
void add_logic(OpTable& t, const std::string& bits) {
  using S = std::make_signed_t<U>;
  add_map<[](U a, U b) { return static_cast<U>(a & b); }, U, U, U>(t, "and.b" + bits);
  add_map<[](U a, U b) { return static_cast<U>(a | b); }, U, U, U>(t, "or.b" + bits);
  add_map<[](U a, U b) { return static_cast<U>(a ^ b); }, U, U, U>(t, "xor.b" + bits);
  add_map<[](U a) { return static_cast<U>(~a); }, U, U>(t, "not.b" + bits);
  add_map<[](U a) { return static_cast<U>(a == 0); }, U, U>(t, "cnot.b" + bits);
  add_map<shift_left<U>, U, U, uint32_t>(t, "shl.b" + bits);
  add_map<shift_right<U>, U, U, uint32_t>(t, "shr.u" + bits);
  add_map<shift_right<U>, U, U, uint32_t>(t, "shr.b" + bits);
  add_map<shift_right<S>, S, S, uint32_t>(t, "shr.s" + bits);
}

template <class T>
T field_extract(T a, uint32_t position, uint32_t length) {
  using U = Unsigned<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 0xFF;
  length &= 0xFF;
  if (length == 0) return 0;
  U result = position >= kBits ? U{0} : static_cast<U>(static_cast<U>(a) >> position);
  const uint32_t top = std::min(position + length - 1, kBits - 1);
  const bool sign = std::is_signed_v<T> && ((static_cast<U>(a) >> top) & 1) != 0;
  if (length < kBits) {
    const U mask = (U{1} << length) - 1;
    result &= mask;
    if (sign) result |= ~mask;
  }
  if (sign && position + length > kBits) {
    const uint32_t valid = position >= kBits ? 0 : kBits - position;
    result |= valid >= kBits ? U{0} : ~U{0} << valid;
  }
  return static_cast<T>(result);
}

template <class U>
U field_insert(U from, U into, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(U);
  position &= 0xFF;
  length &= 0xFF;
  if (length == 0 || position >= kBits) return into;
  const U ones = length >= kBits ? ~U{0} : static_cast<U>((U{1} << length) - 1);
  const U mask = static_cast<U>(ones << position);
  return static_cast<U>((into & ~mask) | ((from << position) & mask));
}

template <class U>
U reverse_bits(U x) {
  U r = 0;
  for (size_t i = 0; i < 8 * sizeof(U); ++i) r |= ((x >> i) & 1) << (8 * sizeof(U) - 1 - i);
  return r;
}

template <class T>
uint32_t find_leading(T a) {
  using U = Unsigned<T>;
  U x = static_cast<U>(a);
  if (std::is_signed_v<T> && a < 0) x = ~x;
  return x == 0 ? 0xFFFFFFFFu : static_cast<uint32_t>(8 * sizeof(T) - 1 - std::countl_zero(x));
}

// The hardware's three-input logic: bit i of the table is the result for inputs (a, b, c) = i.
void lop3(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t* a = warp.at<const uint32_t>(inst.operand[1]);
  const uint32_t* b = warp.at<const uint32_t>(inst.operand[2]);
  const uint32_t* c = warp.at<const uint32_t>(inst.operand[3]);
  const int table = inst.operand[4];
  alignas(64) uint32_t result[kLanes] = {};
  for (int i = 0; i < 8; ++i) {
    if (((table >> i) & 1) == 0) continue;
    const uint32_t flip_a = (i & 4) ? 0 : ~0u;
    const uint32_t flip_b = (i & 2) ? 0 : ~0u;
    const uint32_t flip_c = (i & 1) ? 0 : ~0u;
    for (int l = 0; l < kLanes; ++l)
      result[l] |= (a[l] ^ flip_a) & (b[l] ^ flip_b) & (c[l] ^ flip_c);
  }
  store_lanes(warp.at<uint32_t>(inst.operand[0]), result, mask);
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | (static_cast<uint64_t>(b) << 32);
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = (selector >> (4 * i)) & 0xF;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xFF;
    if (s & 8) byte = (byte & 0x80) ? 0xFF : 0;
    r |= byte << (8 * i);
  }
  return r;
}

uint32_t funnel_left(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>((((static_cast<uint64_t>(hi) << 32) | lo) << n) >> 32);
}
uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(hi) << 32) | lo) >> n);
}

void add_bit_ops(OpTable& t) {
  using U = uint32_t;
  using W = uint64_t;
  t.add("lop3.b32", "r=rrri", lop3);
  add_map<permute_bytes, U, U, U, U>(t, "prmt.b32");
  add_map<[](U lo, U hi, U n) { return funnel_left(lo, hi, n & 31); }, U, U, U, U>(
      t, "shf.l.wrap.b32");
  add_map<[](U lo, U hi, U n) { return funnel_right(lo, hi, n & 31); }, U, U, U, U>(
      t, "shf.r.wrap.b32");
  add_map<[](U lo, U hi, U n) { return funnel_left(lo, hi, std::min(n, 32u)); }, U, U, U, U>(
      t, "shf.l.clamp.b32");
  add_map<[](U lo, U hi, U n) { return funnel_right(lo, hi, std::min(n, 32u)); }, U, U, U, U>(
      t, "shf.r.clamp.b32");
  add_map<field_extract<uint32_t>, U, U, U, U>(t, "bfe.u32");
  add_map<field_extract<int32_t>, int32_t, int32_t, U, U>(t, "bfe.s32");
  add_map<field_extract<uint64_t>, W, W, U, U>(t, "bfe.u64");
  add_map<field_extract<int64_t>, int64_t, int64_t, U, U>(t, "bfe.s64");
  add_map<field_insert<uint32_t>, U, U, U, U, U>(t, "bfi.b32");
  add_map<field_insert<uint64_t>, W, W, W, U, U>(t, "bfi.b64");
  add_map<reverse_bits<uint32_t>, U, U>(t, "brev.b32");
  add_map<reverse_bits<uint64_t>, W, W>(t, "brev.b64");
  add_map<[](U a) { return static_cast<U>(std::popcount(a)); }, U, U>(t, "popc.b32");
  add_map<[](W a) { return static_cast<U>(std::popcount(a)); }, U, W>(t, "popc.b64");
  add_map<[](U a) { return static_cast<U>(std::countl_zero(a)); }, U, U>(t, "clz.b32");
  add_map<[](W a) { return static_cast<U>(std::countl_zero(a)); }, U, W>(t, "clz.b64");
  add_map<find_leading<uint32_t>, U, U>(t, "bfind.u32");
  add_map<find_leading<int32_t>, U, int32_t>(t, "bfind.s32");
  add_map<find_leading<uint64_t>, U, W>(t, "bfind.u64");
  add_map<find_leading<int64_t>, U, int64_t>(t, "bfind.s64");
}

}  // namespace

void add_integer_ops(OpTable& t) {
  add_arithmetic<int16_t>(t, "s16");
  add_arithmetic<uint16_t>(t, "u16");
  add_arithmetic<int32_t>(t, "s32");
  add_arithmetic<uint32_t>(t, "u32");
  add_arithmetic<int64_t>(t, "s64");
  add_arithmetic<uint64_t>(t, "u64");
  add_logic<uint16_t>(t, "16");
  add_logic<uint32_t>(t, "32");
  add_logic<uint64_t>(t, "64");
  add_bit_ops(t);
}

}  // namespace ptx
