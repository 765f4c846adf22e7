// setp, selp, and logic on predicates. A predicate is one bit per lane.
#include "half.h"
#include "ops.h"

namespace ptx {

namespace {

struct Eq {
  template <class T>
  static bool test(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool test(T a, T b) {
    return (a < b) || (a > b);
  }
};
struct Lt {
  template <class T>
  static bool test(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool test(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool test(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool test(T a, T b) {
    return a >= b;
  }
};
struct Equ {
  template <class T>
  static bool test(T a, T b) {
    return !(a < b || a > b);
  }
};
struct Neu {
  template <class T>
  static bool test(T a, T b) {
    return !(a == b);
  }
};
struct Ltu {
  template <class T>
  static bool test(T a, T b) {
    return !(a >= b);
  }
};
struct Leu {
  template <class T>
  static bool test(T a, T b) {
    return !(a > b);
  }
};
struct Gtu {
  template <class T>
  static bool test(T a, T b) {
    return !(a <= b);
  }
};
struct Geu {
  template <class T>
  static bool test(T a, T b) {
    return !(a < b);
  }
};
struct Num {
  template <class T>
  static bool test(T a, T b) {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  static bool test(T a, T b) {
    return a != a || b != b;
  }
};

template <class T, class Compare>
uint32_t compare_lanes(Warp& warp, int32_t a_place, int32_t b_place) {
  alignas(64) uint32_t result[kLanes];
  if constexpr (std::is_same_v<T, Fp16> || std::is_same_v<T, Bf16>) {
    const uint32_t* a = warp.at<const uint32_t>(a_place);
    const uint32_t* b = warp.at<const uint32_t>(b_place);
    for (int l = 0; l < kLanes; ++l) {
      result[l] = Compare::test(T::widen(static_cast<uint16_t>(a[l])),
                                T::widen(static_cast<uint16_t>(b[l])));
    }
  } else {
    const Stored<T>* a = warp.at<const Stored<T>>(a_place);
    const Stored<T>* b = warp.at<const Stored<T>>(b_place);
    for (int l = 0; l < kLanes; ++l)
      result[l] = Compare::test(static_cast<T>(a[l]), static_cast<T>(b[l]));
  }
  return pack_bits(result);
}

enum class Logic { kNone, kAnd, kOr, kXor };

template <Logic kLogic>
uint32_t combine(uint32_t a, uint32_t b) {
  if constexpr (kLogic == Logic::kAnd)
    return a & b;
  else if constexpr (kLogic == Logic::kOr)
    return a | b;
  else if constexpr (kLogic == Logic::kXor)
    return a ^ b;
  else
    return a;
}

// setp p[|q], a, b[, c]: p = (a ? b) op c, q = !(a ? b) op c.
template <class T, class Compare, Logic kLogic, bool kTwo, bool kFtz>
void setp(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand + (kTwo ? 2 : 1);
  if constexpr (std::is_floating_point_v<T>) set_ftz(kFtz);
  const uint32_t truth = compare_lanes<T, Compare>(warp, o[0], o[1]);
  uint32_t other = 0;
  if constexpr (kLogic != Logic::kNone) other = warp.pred(o[2]) ^ static_cast<uint32_t>(o[3]);
  store_pred(warp.pred(inst.operand[0]), combine<kLogic>(truth, other), mask);
  if constexpr (kTwo) store_pred(warp.pred(inst.operand[1]), combine<kLogic>(~truth, other), mask);
}

template <class T, class Compare, bool kFtz>
void add_setp_forms(OpTable& t, const std::string& compare, const std::string& type) {
  const char l = std::is_same_v<T, Fp16> || std::is_same_v<T, Bf16> ? 'h' : letter_of<T>();
  const std::string one = std::string("p=") + l + l;
  const std::string two = std::string("pp=") + l + l;
  t.add("setp." + compare + type, one, setp<T, Compare, Logic::kNone, false, kFtz>);
  t.add("setp." + compare + type, two, setp<T, Compare, Logic::kNone, true, kFtz>);
  t.add("setp." + compare + ".and" + type, one + "q", setp<T, Compare, Logic::kAnd, false, kFtz>);
  t.add("setp." + compare + ".or" + type, one + "q", setp<T, Compare, Logic::kOr, false, kFtz>);
  t.add("setp." + compare + ".xor" + type, one + "q", setp<T, Compare, Logic::kXor, false, kFtz>);
  t.add("setp." + compare + ".and" + type, two + "q", setp<T, Compare, Logic::kAnd, true, kFtz>);
  t.add("setp." + compare + ".or" + type, two + "q", setp<T, Compare, Logic::kOr, true, kFtz>);
}

template <class T>
void add_setp_integer(OpTable& t, const std::string& type) {
  add_setp_forms<T, Eq, false>(t, "eq", type);
  add_setp_forms<T, Ne, false>(t, "ne", type);
  if (type[1] == 'b') return;
  add_setp_forms<T, Lt, false>(t, "lt", type);
  add_setp_forms<T, Le, false>(t, "le", type);
  add_setp_forms<T, Gt, false>(t, "gt", type);
  add_setp_forms<T, Ge, false>(t, "ge", type);
  if (type[1] != 'u') return;
  add_setp_forms<T, Lt, false>(t, "lo", type);
  add_setp_forms<T, Le, false>(t, "ls", type);
  add_setp_forms<T, Gt, false>(t, "hi", type);
  add_setp_forms<T, Ge, false>(t, "hs", type);
}

template <class T, bool kFtz>
void add_setp_float(OpTable& t, const std::string& type) {
  add_setp_forms<T, Eq, kFtz>(t, "eq", type);
  add_setp_forms<T, Ne, kFtz>(t, "ne", type);
  add_setp_forms<T, Lt, kFtz>(t, "lt", type);
  add_setp_forms<T, Le, kFtz>(t, "le", type);
  add_setp_forms<T, Gt, kFtz>(t, "gt", type);
  add_setp_forms<T, Ge, kFtz>(t, "ge", type);
  add_setp_forms<T, Equ, kFtz>(t, "equ", type);
  add_setp_forms<T, Neu, kFtz>(t, "neu", type);
  add_setp_forms<T, Ltu, kFtz>(t, "ltu", type);
  add_setp_forms<T, Leu, kFtz>(t, "leu", type);
  add_setp_forms<T, Gtu, kFtz>(t, "gtu", type);
  add_setp_forms<T, Geu, kFtz>(t, "geu", type);
  add_setp_forms<T, Num, kFtz>(t, "num", type);
  add_setp_forms<T, Nan, kFtz>(t, "nan", type);
}

template <class U>
void selp(Warp& warp, const Inst& inst, uint32_t mask) {
  const Stored<U>* a = warp.at<const Stored<U>>(inst.operand[1]);
  const Stored<U>* b = warp.at<const Stored<U>>(inst.operand[2]);
  const uint32_t p = warp.pred(inst.operand[3]) ^ static_cast<uint32_t>(inst.operand[4]);
  alignas(64) Stored<U> result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = (p >> l) & 1 ? a[l] : b[l];
  store_lanes(warp.at<Stored<U>>(inst.operand[0]), result, mask);
}

template <Logic kLogic>
void pred_logic(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  const uint32_t a = warp.pred(o[1]) ^ static_cast<uint32_t>(o[2]);
  uint32_t b = 0;
  if constexpr (kLogic != Logic::kNone) b = warp.pred(o[3]) ^ static_cast<uint32_t>(o[4]);
  store_pred(warp.pred(o[0]), combine<kLogic>(a, b), mask);
}

void pred_not(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  store_pred(warp.pred(o[0]), ~(warp.pred(o[1]) ^ static_cast<uint32_t>(o[2])), mask);
}

}  // namespace

void add_compare_ops(OpTable& t) {
  add_setp_integer<uint16_t>(t, ".b16");
  add_setp_integer<uint16_t>(t, ".u16");
  add_setp_integer<int16_t>(t, ".s16");
  add_setp_integer<uint32_t>(t, ".b32");
  add_setp_integer<uint32_t>(t, ".u32");
  add_setp_integer<int32_t>(t, ".s32");
  add_setp_integer<uint64_t>(t, ".b64");
  add_setp_integer<uint64_t>(t, ".u64");
  add_setp_integer<int64_t>(t, ".s64");
  add_setp_float<float, false>(t, ".f32");
  add_setp_float<float, true>(t, ".ftz.f32");
  add_setp_float<double, false>(t, ".f64");
  add_setp_float<Fp16, false>(t, ".f16");
  add_setp_float<Bf16, false>(t, ".bf16");
  for (const char* type : {"b16", "u16", "s16"})
    t.add(std::string("selp.") + type, "h=hhq", selp<uint16_t>);
  for (const char* type : {"b32", "u32", "s32", "f32"})
    t.add(std::string("selp.") + type, "r=rrq", selp<uint32_t>);
  for (const char* type : {"b64", "u64", "s64", "f64"})
    t.add(std::string("selp.") + type, "d=ddq", selp<uint64_t>);
  t.add("and.pred", "p=qq", pred_logic<Logic::kAnd>);
  t.add("or.pred", "p=qq", pred_logic<Logic::kOr>);
  t.add("xor.pred", "p=qq", pred_logic<Logic::kXor>);
  t.add("mov.pred", "p=q", pred_logic<Logic::kNone>);
  t.add("not.pred", "p=q", pred_not);
}

}  // namespace ptx
