// atom and red. Lanes of a warp are served in ascending order.
#include "access.h"
#include "half.h"
#include "ops.h"

namespace ptx {

namespace {

template <auto kFunction, class T>
void update(char* at, T operand, T& old) {
  std::memcpy(&old, at, sizeof(T));
  const T next = kFunction(old, operand);
  std::memcpy(at, &next, sizeof(T));
}

// kResult: atom, which returns the old value; otherwise red, with kVector operands.
template <Space kSpace, auto kFunction, class T, bool kResult, int kVector>
void atomic(Warp& warp, const Inst& inst, uint32_t mask) {
  if constexpr (std::is_floating_point_v<T>) set_ftz(false);
  Request r;
  r.warp = &warp;
  r.pc = pc_of(warp, inst);
  r.mask = mask;
  r.bytes = sizeof(T) * kVector;
  r.access = Access::kAtomic;
  const int32_t* o = inst.operand + (kResult ? 1 : 0);
  read_addresses(warp, o, r.address);
  resolve(r, kSpace);
  warp.block->counters->atomics += std::popcount(mask);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    for (int v = 0; v < kVector; ++v) {
      T old;
      update<kFunction, T>(r.host[l] + v * sizeof(T), warp.at<const T>(o[3 + v])[l], old);
      if constexpr (kResult) warp.at<T>(inst.operand[0])[l] = old;
    }
  }
}

template <Space kSpace, class T>
void compare_and_swap(Warp& warp, const Inst& inst, uint32_t mask) {
  Request r;
  r.warp = &warp;
  r.pc = pc_of(warp, inst);
  r.mask = mask;
  r.bytes = sizeof(T);
  r.access = Access::kAtomic;
  read_addresses(warp, inst.operand + 1, r.address);
  resolve(r, kSpace);
  warp.block->counters->atomics += std::popcount(mask);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    T old;
    std::memcpy(&old, r.host[l], sizeof(T));
    const T expected = warp.at<const T>(inst.operand[4])[l];
    const T desired = warp.at<const T>(inst.operand[5])[l];
    if (old == expected) std::memcpy(r.host[l], &desired, sizeof(T));
    warp.at<T>(inst.operand[0])[l] = old;
  }
}

template <class H>
uint32_t add_packed(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) -> uint32_t {
    return H::narrow(H::widen(static_cast<uint16_t>(x)) + H::widen(static_cast<uint16_t>(y)));
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
}

template <Space kSpace, auto kFunction, class T>
void add_one(OpTable& t, const std::string& prefix, const std::string& name) {
  const char l = letter_of<T>();
  t.add("atom" + prefix + name, std::string{l, '=', 'M', l}, atomic<kSpace, kFunction, T, true, 1>);
  t.add("red" + prefix + name, std::string{'M', l}, atomic<kSpace, kFunction, T, false, 1>);
}

template <Space kSpace, class T>
void add_integer(OpTable& t, const std::string& p, const std::string& type) {
  add_one<kSpace,
          [](T a, T b) {
            return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) +
                                  static_cast<std::make_unsigned_t<T>>(b));
          },
          T>(t, p, ".add" + type);
  add_one<kSpace, [](T a, T b) { return a < b ? a : b; }, T>(t, p, ".min" + type);
  add_one<kSpace, [](T a, T b) { return (a > b) ? a : b; }, T>(t, p, ".max" + type);
}

template <Space kSpace, class T>
void add_bits(OpTable& t, const std::string& p, const std::string& type) {
  add_one<kSpace, [](T a, T b) { return a & b; }, T>(t, p, ".and" + type);
  add_one<kSpace, [](T a, T b) { return a | b; }, T>(t, p, ".or" + type);
  add_one<kSpace, [](T a, T b) { return a ^ b; }, T>(t, p, ".xor" + type);
  add_one<kSpace, [](T, T b) { return b; }, T>(t, p, ".exch" + type);
  const char l = letter_of<T>();
  t.add("atom" + p + ".cas" + type, std::string{l, '=', 'M', l, l}, compare_and_swap<kSpace, T>);
}

template <Space kSpace>
void add_space(OpTable& t, const std::string& p) {
  using U = uint32_t;
  constexpr auto plus = [](auto a, auto b) { return a + b; };
  add_integer<kSpace, int32_t>(t, p, ".s32");
  add_integer<kSpace, U>(t, p, ".u32");
  add_integer<kSpace, int64_t>(t, p, ".s64");
  add_integer<kSpace, uint64_t>(t, p, ".u64");
  add_bits<kSpace, U>(t, p, ".b32");
  add_bits<kSpace, uint64_t>(t, p, ".b64");
  add_one<kSpace, [](U a, U b) { return (a >= b) ? 0 : a + 1; }, U>(t, p, ".inc.u32");
  add_one<kSpace, [](U a, U b) { return (a == 0 || a > b) ? b : a - 1; }, U>(t, p, ".dec.u32");
  add_one<kSpace, plus, float>(t, p, ".add.f32");
  add_one<kSpace, plus, float>(t, p, ".add.ftz.f32");
  add_one<kSpace, plus, double>(t, p, ".add.f64");
  add_one<kSpace, add_packed<Fp16>, U>(t, p, ".add.noftz.f16x2");
  add_one<kSpace, add_packed<Bf16>, U>(t, p, ".add.noftz.bf16x2");
  if constexpr (kSpace == Space::kGlobal) {
    t.add("red" + p + ".add.v2.f32", "Mrr", atomic<kSpace, plus, float, false, 2>);
    t.add("red" + p + ".add.v4.f32", "Mrrrr", atomic<kSpace, plus, float, false, 4>);
  }
}

}  // namespace

void add_atomic_ops(OpTable& t) {
  for (const char* order :
       {"", ".relaxed.cta", ".relaxed.gpu", ".relaxed.sys", ".acquire.gpu", ".release.gpu",
        ".acq_rel.gpu", ".acquire.cta", ".release.cta", ".acq_rel.cta", ".gpu", ".cta", ".sys"}) {
    const std::string o = order;
    add_space<Space::kGlobal>(t, o + ".global");
    add_space<Space::kGeneric>(t, o);
    add_space<Space::kShared>(t, o + ".shared");
    add_space<Space::kShared>(t, o + ".shared::cta");
  }
}

}  // namespace ptx
