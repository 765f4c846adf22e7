// mov in all its shapes, and conversion of addresses between spaces.
#include "ops.h"

namespace ptx {

namespace {

template <class U>
void move(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) U copy[kLanes];
  std::memcpy(copy, warp.at<const U>(inst.operand[1]), sizeof(copy));
  store_lanes(warp.at<U>(inst.operand[0]), copy, mask);
}

// One register of sizeof(Whole) from kParts registers, the first in the low bits.
template <class Whole, class Part, int kParts>
void pack(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) Whole result[kLanes] = {};
  for (int i = 0; i < kParts; ++i) {
    const Stored<Part>* from = warp.at<const Stored<Part>>(inst.operand[1 + i]);
    for (int l = 0; l < kLanes; ++l) {
      result[l] |= static_cast<Whole>(static_cast<Part>(from[l])) << (8 * sizeof(Part) * i);
    }
  }
  store_lanes(warp.at<Whole>(inst.operand[0]), result, mask);
}

template <class Whole, class Part, int kParts>
void unpack(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) Whole from[kLanes];
  std::memcpy(from, warp.at<const Whole>(inst.operand[kParts]), sizeof(from));
  for (int i = 0; i < kParts; ++i) {
    alignas(64) Stored<Part> result[kLanes];
    for (int l = 0; l < kLanes; ++l)
      result[l] = static_cast<Part>(from[l] >> (8 * sizeof(Part) * i));
    store_lanes(warp.at<Stored<Part>>(inst.operand[i]), result, mask);
  }
}

template <uint64_t kWindow>
uint64_t to_generic(uint64_t x) {
  return x | kWindow;
}
uint64_t from_generic(uint64_t x) { return x & ~kWindowMask; }

template <uint64_t kWindow>
void is_space(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint64_t* address = warp.at<const uint64_t>(inst.operand[1]);
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= ((address[l] & kWindowMask) == kWindow ? 1u : 0u) << l;
  store_pred(warp.pred(inst.operand[0]), bits, mask);
}

}  // namespace

void add_move_ops(OpTable& t) {
  for (const char* type : {"b16", "u16", "s16", "f16"})
    t.add(std::string("mov.") + type, "h=h", move<uint32_t>);
  for (const char* type : {"b32", "u32", "s32", "f32"})
    t.add(std::string("mov.") + type, "r=r", move<uint32_t>);
  for (const char* type : {"b64", "u64", "s64", "f64"})
    t.add(std::string("mov.") + type, "d=d", move<uint64_t>);
  t.add("mov.b32", "r=hh", pack<uint32_t, uint16_t, 2>);
  t.add("mov.b32", "hh=r", unpack<uint32_t, uint16_t, 2>);
  t.add("mov.b64", "d=rr", pack<uint64_t, uint32_t, 2>);
  t.add("mov.b64", "rr=d", unpack<uint64_t, uint32_t, 2>);
  t.add("mov.b64", "d=hhhh", pack<uint64_t, uint16_t, 4>);
  t.add("mov.b64", "hhhh=d", unpack<uint64_t, uint16_t, 4>);
  using A = uint64_t;
  for (const char* space : {"global", "const"}) {
    add_map<[](A x) { return x; }, A, A>(t, std::string("cvta.") + space + ".u64");
    add_map<[](A x) { return x; }, A, A>(t, std::string("cvta.to.") + space + ".u64");
  }
  add_map<to_generic<kSharedWindow>, A, A>(t, "cvta.shared.u64");
  add_map<to_generic<kLocalWindow>, A, A>(t, "cvta.local.u64");
  add_map<to_generic<kParamWindow>, A, A>(t, "cvta.param.u64");
  for (const char* space : {"shared", "local", "param"}) {
    add_map<from_generic, A, A>(t, std::string("cvta.to.") + space + ".u64");
  }
  t.add("isspacep.global", "p=d", is_space<0>);
  t.add("isspacep.shared", "p=d", is_space<kSharedWindow>);
  t.add("isspacep.local", "p=d", is_space<kLocalWindow>);
}

}  // namespace ptx
