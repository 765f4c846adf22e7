// Exchange between the lanes of a warp: shfl, vote, match, redux, elect.
#include "ops.h"

namespace ptx {

namespace {

// The member masks of the executing lanes must agree; all members must be here.
bool gather_members(Warp& warp, uint32_t mask, int32_t member_place, uint32_t& members) {
  const uint32_t* each = warp.at<const uint32_t>(member_place);
  members = each[__builtin_ctz(mask)] & warp.live;
  return !warp.needs_lanes(mask, members);
}

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

template <Shuffle kKind, bool kPred>
void shuffle(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand + (kPred ? 2 : 1);
  uint32_t members = 0;
  if (!gather_members(warp, mask, o[3], members)) return;
  const uint32_t* value = warp.at<const uint32_t>(o[0]);
  const uint32_t* b = warp.at<const uint32_t>(o[1]);
  const uint32_t* c = warp.at<const uint32_t>(o[2]);
  alignas(64) uint32_t result[kLanes] = {};
  uint32_t in_range = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int segment = static_cast<int>((c[l] >> 8) & 0x1F);
    const int bound = static_cast<int>(c[l] & 0x1F);
    const int max_lane = (l & segment) | (bound & ~segment);
    const int min_lane = l & segment;
    const int delta = static_cast<int>(b[l] & 0x1F);
    int from = l;
    bool inside = true;
    switch (kKind) {
      case Shuffle::kUp:
        from = l - delta;
        inside = from >= max_lane;
        break;
      case Shuffle::kDown:
        from = l + delta;
        inside = from <= max_lane;
        break;
      case Shuffle::kButterfly:
        from = l ^ delta;
        inside = from <= max_lane;
        break;
      case Shuffle::kIndex:
        from = min_lane | (delta & ~segment);
        inside = from <= max_lane;
        break;
    }
    if (!inside) from = l;
    result[l] = value[from];
    in_range |= (inside ? 1u : 0u) << l;
    if (((mask >> l) & 1) && ((mask >> from) & 1) == 0) {
      warp.block->fail(
          Error::kDivergence, warp, warp.pc, l,
          "shfl.sync reads lane " + std::to_string(from) + ", which does not execute it");
    }
  }
  ++warp.block->counters->shuffles;
  store_lanes(warp.at<uint32_t>(inst.operand[0]), result, mask);
  if constexpr (kPred) store_pred(warp.pred(inst.operand[1]), in_range, mask);
}

template <Shuffle kKind>
void add_shuffle(OpTable& t, const std::string& name) {
  t.add(name, "r=rrrr", shuffle<kKind, false>);
  t.add(name, "rp=rrrr", shuffle<kKind, true>);
}

enum class Vote { kAll, kAny, kUniform };

template <Vote kKind>
void vote(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  uint32_t members = 0;
  if (!gather_members(warp, mask, o[3], members)) return;
  const uint32_t set = (warp.pred(o[1]) ^ static_cast<uint32_t>(o[2])) & members;
  const bool result = kKind == Vote::kAll   ? set == members
                      : kKind == Vote::kAny ? set != 0
                                            : set == members || set == 0;
  store_pred(warp.pred(o[0]), result ? kAllLanes : 0, mask);
}

void broadcast(Warp& warp, int32_t place, uint32_t value, uint32_t mask) {
  alignas(64) uint32_t all[kLanes];
  for (uint32_t& x : all) x = value;
  store_lanes(warp.at<uint32_t>(place), all, mask);
}

void ballot(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  uint32_t members = 0;
  if (!gather_members(warp, mask, o[3], members)) return;
  broadcast(warp, o[0], (warp.pred(o[1]) ^ static_cast<uint32_t>(o[2])) & members, mask);
}

void active_mask(Warp& warp, const Inst& inst, uint32_t mask) {
  broadcast(warp, inst.operand[0], mask, mask);
}

template <class T>
void match_any(Warp& warp, const Inst& inst, uint32_t mask) {
  uint32_t members = 0;
  if (!gather_members(warp, mask, inst.operand[2], members)) return;
  const T* value = warp.at<const T>(inst.operand[1]);
  alignas(64) uint32_t result[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    for (int m = 0; m < kLanes; ++m) {
      if (((members >> m) & 1) && value[m] == value[l]) result[l] |= 1u << m;
    }
  }
  store_lanes(warp.at<uint32_t>(inst.operand[0]), result, mask);
}

template <auto kFunction, class T>
void reduce(Warp& warp, const Inst& inst, uint32_t mask) {
  uint32_t members = 0;
  if (!gather_members(warp, mask, inst.operand[2], members)) return;
  const T* value = warp.at<const T>(inst.operand[1]);
  T total = value[__builtin_ctz(members)];
  for (uint32_t rest = members & (members - 1); rest != 0; rest &= rest - 1) {
    total = kFunction(total, value[__builtin_ctz(rest)]);
  }
  broadcast(warp, inst.operand[0], static_cast<uint32_t>(total), mask);
}

template <auto kFunction, class T>
void add_reduce(OpTable& t, const std::string& name) {
  t.add("redux.sync." + name, "r=rr", reduce<kFunction, T>);
}

void elect(Warp& warp, const Inst& inst, uint32_t mask) {
  uint32_t members = 0;
  if (!gather_members(warp, mask, inst.operand[2], members)) return;
  const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(members));
  broadcast(warp, inst.operand[0], leader, mask);
  store_pred(warp.pred(inst.operand[1]), 1u << leader, mask);
}

}  // namespace

void add_warp_ops(OpTable& t) {
  add_shuffle<Shuffle::kUp>(t, "shfl.sync.up.b32");
  add_shuffle<Shuffle::kDown>(t, "shfl.sync.down.b32");
  add_shuffle<Shuffle::kButterfly>(t, "shfl.sync.bfly.b32");
  add_shuffle<Shuffle::kIndex>(t, "shfl.sync.idx.b32");
  t.add("vote.sync.all.pred", "p=qr", vote<Vote::kAll>);
  t.add("vote.sync.any.pred", "p=qr", vote<Vote::kAny>);
  t.add("vote.sync.uni.pred", "p=qr", vote<Vote::kUniform>);
  t.add("vote.sync.ballot.b32", "r=qr", ballot);
  t.add("activemask.b32", "r=", active_mask);
  t.add("match.any.sync.b32", "r=rr", match_any<uint32_t>);
  t.add("match.any.sync.b64", "r=dr", match_any<uint64_t>);
  using U = uint32_t;
  using S = int32_t;
  add_reduce<[](U a, U b) { return a + b; }, U>(t, "add.u32");
  add_reduce<[](U a, U b) { return a + b; }, U>(t, "add.s32");
  add_reduce<[](U a, U b) { return a < b ? a : b; }, U>(t, "min.u32");
  add_reduce<[](S a, S b) { return a < b ? a : b; }, S>(t, "min.s32");
  add_reduce<[](U a, U b) { return (a > b) ? a : b; }, U>(t, "max.u32");
  add_reduce<[](S a, S b) { return (a > b) ? a : b; }, S>(t, "max.s32");
  add_reduce<[](U a, U b) { return a & b; }, U>(t, "and.b32");
  add_reduce<[](U a, U b) { return a | b; }, U>(t, "or.b32");
  add_reduce<[](U a, U b) { return a ^ b; }, U>(t, "xor.b32");
  t.add("elect.sync", "rp=r", elect);
}

}  // namespace ptx
