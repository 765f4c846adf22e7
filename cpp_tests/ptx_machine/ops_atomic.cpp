// atom and red. Lanes of a warp are served in ascending order.
#include "access.h"
#include "grid.h"
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

template <class H>
struct AddPacked {
  static uint32_t one(uint32_t x, uint32_t y) {
    return H::narrow(H::widen(static_cast<uint16_t>(x)) + H::widen(static_cast<uint16_t>(y)));
  }
  uint32_t operator()(uint32_t a, uint32_t b) const {
    return one(a, b) | one(a >> 16, b >> 16) << 16;
  }
};

// Floating-point updates are additions, which round: their order matters.
template <class F>
inline constexpr bool kRounds = false;
template <class H>
inline constexpr bool kRounds<AddPacked<H>> = true;
template <auto kFunction, class T>
inline constexpr bool kIsSum =
    std::is_floating_point_v<T> || kRounds<std::remove_cv_t<decltype(kFunction)>>;

template <Space kSpace>
void order_update(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order) {
  if (kSpace == Space::kShared) return;
  acquire_words(warp, address, mask, order);
  release_words(warp, address, mask, order, true);
  if (acquires(order)) yield_poll(warp);
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
  r.how = static_cast<uint8_t>(how_of(o[3 + kVector]) | (kIsSum<kFunction, T> ? kSum : 0));
  read_addresses(warp, o, r.address);
  resolve(r, kSpace);
  order_update<kSpace>(warp, r.address, mask, o[3 + kVector]);
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
  r.how = how_of(inst.operand[6]);
  read_addresses(warp, inst.operand + 1, r.address);
  resolve(r, kSpace);
  order_update<kSpace>(warp, r.address, mask, inst.operand[6]);
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

template <Space kSpace, auto kFunction, class T>
void add_one(OpTable& t, const std::string& prefix, const std::string& name, int32_t order) {
  const char l = letter_of<T>();
  t.add("atom" + prefix + name, std::string{l, '=', 'M', l, '#'},
        atomic<kSpace, kFunction, T, true, 1>, order);
  t.add("red" + prefix + name, std::string{'M', l, '#'}, atomic<kSpace, kFunction, T, false, 1>,
        order);
}

template <Space kSpace, class T>
void add_integer(OpTable& t, const std::string& p, const std::string& type, int32_t order) {
  add_one<kSpace,
          [](T a, T b) {
            return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) +
                                  static_cast<std::make_unsigned_t<T>>(b));
          },
          T>(t, p, ".add" + type, order);
  add_one<kSpace, [](T a, T b) { return a < b ? a : b; }, T>(t, p, ".min" + type, order);
  add_one<kSpace, [](T a, T b) { return (a > b) ? a : b; }, T>(t, p, ".max" + type, order);
}

template <Space kSpace, class T>
void add_bits(OpTable& t, const std::string& p, const std::string& type, int32_t order) {
  add_one<kSpace, [](T a, T b) { return a & b; }, T>(t, p, ".and" + type, order);
  add_one<kSpace, [](T a, T b) { return a | b; }, T>(t, p, ".or" + type, order);
  add_one<kSpace, [](T a, T b) { return a ^ b; }, T>(t, p, ".xor" + type, order);
  add_one<kSpace, [](T, T b) { return b; }, T>(t, p, ".exch" + type, order);
  const char l = letter_of<T>();
  t.add("atom" + p + ".cas" + type, std::string{l, '=', 'M', l, l, '#'},
        compare_and_swap<kSpace, T>, order);
}

template <Space kSpace>
void add_space(OpTable& t, const std::string& p, int32_t order) {
  using U = uint32_t;
  constexpr auto plus = [](auto a, auto b) { return a + b; };
  add_integer<kSpace, int32_t>(t, p, ".s32", order);
  add_integer<kSpace, U>(t, p, ".u32", order);
  add_integer<kSpace, int64_t>(t, p, ".s64", order);
  add_integer<kSpace, uint64_t>(t, p, ".u64", order);
  add_bits<kSpace, U>(t, p, ".b32", order);
  add_bits<kSpace, uint64_t>(t, p, ".b64", order);
  add_one<kSpace, [](U a, U b) { return (a >= b) ? 0 : a + 1; }, U>(t, p, ".inc.u32", order);
  add_one<kSpace, [](U a, U b) { return (a == 0 || a > b) ? b : a - 1; }, U>(t, p, ".dec.u32",
                                                                             order);
  add_one<kSpace, plus, float>(t, p, ".add.f32", order);
  add_one<kSpace, plus, float>(t, p, ".add.ftz.f32", order);
  add_one<kSpace, plus, double>(t, p, ".add.f64", order);
  add_one<kSpace, AddPacked<Fp16>{}, U>(t, p, ".add.noftz.f16x2", order);
  add_one<kSpace, AddPacked<Bf16>{}, U>(t, p, ".add.noftz.bf16x2", order);
  if constexpr (kSpace == Space::kGlobal) {
    t.add("red" + p + ".add.v2.f32", "Mrr#", atomic<kSpace, plus, float, false, 2>, order);
    t.add("red" + p + ".add.v4.f32", "Mrrrr#", atomic<kSpace, plus, float, false, 4>, order);
  }
}

}  // namespace

void add_atomic_ops(OpTable& t) {
  const auto add = [&](const std::string& o, int32_t order) {
    add_space<Space::kGlobal>(t, o + ".global", order);
    add_space<Space::kGeneric>(t, o, order);
    add_space<Space::kShared>(t, o + ".shared", order);
    add_space<Space::kShared>(t, o + ".shared::cta", order);
  };
  add("", kRelaxed);
  for (const auto& [scope, in_block] : kScopes) {
    const std::string end = scope;
    add(end, kRelaxed | in_block);
    add(".relaxed" + end, kRelaxed | in_block);
    add(".acquire" + end, kAcquire | in_block);
    add(".release" + end, kRelease | in_block);
    add(".acq_rel" + end, kAcquireRelease | in_block);
  }
}

}  // namespace ptx
