// cp.async.bulk and cp.reduce.async.bulk, with and without a tensor map, their groups, and the
// hints around them.
#include "global_shadow.h"
#include "ops.h"

namespace ptx {

namespace {

// The tensor map at a generic address: a kernel parameter or global memory.
TensorMap read_map(Warp& warp, uint32_t pc, int lane, uint64_t address) {
  Block& block = *warp.block;
  TensorMap map;
  const uint64_t inside = address & ~kWindowMask;
  if ((address & kWindowMask) == kParamWindow) {
    if (inside + 128 > block.params.size())
      block.fail(Error::kOutOfBounds, warp, pc, lane,
                 "the tensor map lies outside of the kernel's parameters");
    std::memcpy(&map, block.params.data() + inside, sizeof map);
  } else {
    const Allocation* range = global_memory().find(address);
    if (range == nullptr || address + 128 > range->end)
      block.fail(Error::kOutOfBounds, warp, pc, lane,
                 "the tensor map lies outside of every allocation");
    std::memcpy(&map, reinterpret_cast<const char*>(address), sizeof map);
  }
  if (inside % 64 != 0)
    block.fail(Error::kMisaligned, warp, pc, lane,
               "the tensor map is not at a multiple of 64 bytes");
  if (!map.is_valid())
    block.fail(Error::kTensorMap, warp, pc, lane,
               "this is no tensor map, or it was changed after it was encoded");
  return map;
}

struct Place {  // one lane of one instruction
  Warp& warp;
  uint32_t pc;
  int lane;
  int thread() const { return warp.first_thread() + lane; }
  Block& block() const { return *warp.block; }
};

// Shared memory of a bulk copy: inside, and aligned.
uint32_t shared_range(const Place& p, uint64_t address, uint32_t bytes, uint32_t alignment) {
  const uint64_t inside = address & ~kWindowMask;
  if (inside % alignment != 0)
    p.block().fail(Error::kMisaligned, p.warp, p.pc, p.lane,
                   "shared address " + std::to_string(inside) +
                       " of a bulk copy is not a multiple of " + std::to_string(alignment));
  const uint64_t offset = inside - kSharedBase;
  if (inside < kSharedBase || offset + bytes > p.block().shared_bytes)
    p.block().fail(Error::kOutOfBounds, p.warp, p.pc, p.lane,
                   "a bulk copy of " + std::to_string(bytes) + " bytes at shared offset " +
                       std::to_string(static_cast<int64_t>(offset)) + "; the block has " +
                       std::to_string(p.block().shared_bytes) + " bytes");
  return static_cast<uint32_t>(offset);
}

void start_load(const Place& p, BulkCopy& copy) {
  copy.thread = p.thread();
  copy.pc = p.pc;
  copy.write = p.block().async.add_write(copy.thread, p.pc);
}

// Global memory that a load reads.
void check_load(const Place& p, const BulkCopy& copy, uint64_t address, uint32_t bytes) {
  check_bulk_global({p.warp, p.pc, p.lane, address, bytes, Access::kRead, kAsync, copy.write});
}

// Global memory that a store or a reduction writes. A reduction is relaxed, of the device's scope.
void check_target(const Place& p, const BulkCopy& copy, uint64_t address, uint32_t bytes) {
  uint8_t how = kAsync;
  if (copy.adds) how |= kStrong;
  if (copy.adds && copy.element != Element::kInteger) how |= kSum;
  const Access access = copy.adds ? Access::kAtomic : Access::kWrite;
  check_bulk_global({p.warp, p.pc, p.lane, address, bytes, access, how});
}

void begin_load(const Place& p, BulkCopy copy, uint64_t barrier) {
  Block& block = p.block();
  Mbarrier& b = block.mbarrier(p.warp, p.pc, p.lane, barrier & ~kWindowMask);
  block.mbarrier_for_copy(p.warp, p.pc, p.lane, b);
  copy.barrier = b.offset;
  if (block.checks &&
      !block.shadow->async_write(block.clocks, copy.thread, copy.offset, copy.bytes, copy.write))
    fail_shadow(p.warp, p.pc, p.lane, "write by a bulk copy");
  block.counters->bulk_load_bytes += copy.bytes;
  block.bulk.add_load(std::move(copy));
}

void begin_store(const Place& p, BulkCopy copy) {
  Block& block = p.block();
  copy.thread = p.thread();
  copy.pc = p.pc;
  copy.read = block.async.add_completion(copy.thread, p.pc);
  if (block.checks)
    block.shadow->mark_async_read(copy.offset, copy.bytes, SharedShadow::kBulkReader, copy.read);
  block.counters->bulk_store_bytes += copy.bytes;
  block.bulk.add_store(std::move(copy));
}

void check_source(const Place& p, uint32_t offset, uint32_t bytes) {
  Block& block = p.block();
  if (block.checks && !block.shadow->async_read(block.clocks, p.thread(), offset, bytes))
    fail_shadow(p.warp, p.pc, p.lane, "read by a bulk copy");
}

template <int kRank>
BulkCopy box_at(Warp& warp, uint32_t pc, int lane, uint64_t map, const int32_t* coordinates) {
  BulkCopy copy;
  copy.tensor = true;
  copy.map = read_map(warp, pc, lane, map);
  if (copy.map.rank != kRank)
    warp.block->fail(Error::kTensorMap, warp, pc, lane,
                     "the tensor map has rank " + std::to_string(copy.map.rank) +
                         ", the instruction " + std::to_string(kRank));
  for (int d = 0; d < kRank; ++d) copy.at[d] = warp.at<const int32_t>(coordinates[d])[lane];
  copy.bytes = copy.map.box_bytes();
  copy.element = copy.map.element;
  return copy;
}

// operands: destination, map, coordinates, mbarrier, [cache hint]
template <int kRank>
void load_box(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t pc = pc_of(warp, inst);
  const int32_t* o = inst.operand;
  alignas(64) uint64_t to[kLanes], map[kLanes], barrier[kLanes];
  read_addresses(warp, o, to);
  read_addresses(warp, o + 3, map);
  read_addresses(warp, o + 6 + kRank, barrier);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const Place place{warp, pc, l};
    BulkCopy copy = box_at<kRank>(warp, pc, l, map[l], o + 6);
    copy.offset = shared_range(place, to[l], copy.bytes, 128);
    start_load(place, copy);
    copy.map.for_rows(copy.at, [&](uint32_t, uint64_t address, uint32_t from, uint32_t end) {
      if (from < end) check_load(place, copy, address + from, end - from);
    });
    begin_load(place, std::move(copy), barrier[l]);
  }
}

// operands: map, coordinates, source, [cache hint]
template <int kRank, bool kAdd>
void store_box(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t pc = pc_of(warp, inst);
  const int32_t* o = inst.operand;
  alignas(64) uint64_t map[kLanes], from[kLanes];
  read_addresses(warp, o, map);
  read_addresses(warp, o + 3 + kRank, from);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const Place place{warp, pc, l};
    BulkCopy copy = box_at<kRank>(warp, pc, l, map[l], o + 3);
    copy.adds = kAdd;
    copy.offset = shared_range(place, from[l], copy.bytes, 128);
    const uint32_t base = static_cast<uint32_t>(kSharedBase) + copy.offset;
    copy.map.for_rows(copy.at, [&](uint32_t row, uint64_t address, uint32_t first, uint32_t end) {
      if (first >= end) return;
      // What lies outside of the tensor is not stored, so it need not be written.
      for (uint32_t chunk = first / 16 * 16; chunk < end; chunk += 16) {
        const uint32_t at = swizzled(base + row + chunk, copy.map.swizzle);
        const uint32_t skip = std::max(first, chunk) - chunk;
        const uint32_t stop = std::min(end - chunk, 16u);
        check_source(place, at - static_cast<uint32_t>(kSharedBase) + skip, stop - skip);
      }
      check_target(place, copy, address + first, end - first);
    });
    begin_store(place, std::move(copy));
  }
}

uint32_t linear_bytes(const Place& p, uint32_t bytes, uint64_t global) {
  if (bytes % 16 != 0 || global % 16 != 0)
    p.block().fail(Error::kMisaligned, p.warp, p.pc, p.lane,
                   "a bulk copy of " + std::to_string(bytes) +
                       " bytes; size and addresses must be multiples of 16");
  return bytes;
}

// operands: destination, source, bytes, mbarrier, [cache hint]
void load_linear(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  alignas(64) uint64_t to[kLanes], from[kLanes], barrier[kLanes];
  read_addresses(warp, o, to);
  read_addresses(warp, o + 3, from);
  read_addresses(warp, o + 7, barrier);
  const uint32_t* bytes = warp.at<const uint32_t>(o[6]);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const Place place{warp, pc_of(warp, inst), l};
    BulkCopy copy;
    copy.bytes = linear_bytes(place, bytes[l], from[l]);
    copy.global = from[l];
    copy.offset = shared_range(place, to[l], copy.bytes, 16);
    if (copy.bytes == 0) continue;
    start_load(place, copy);
    check_load(place, copy, copy.global, copy.bytes);
    begin_load(place, std::move(copy), barrier[l]);
  }
}

// operands: destination, source, bytes, [cache hint]
template <bool kAdd, Element kElement>
void store_linear(Warp& warp, const Inst& inst, uint32_t mask) {
  const int32_t* o = inst.operand;
  alignas(64) uint64_t to[kLanes], from[kLanes];
  read_addresses(warp, o, to);
  read_addresses(warp, o + 3, from);
  const uint32_t* bytes = warp.at<const uint32_t>(o[6]);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const Place place{warp, pc_of(warp, inst), l};
    BulkCopy copy;
    copy.adds = kAdd;
    copy.element = kElement;
    copy.bytes = linear_bytes(place, bytes[l], to[l]);
    copy.global = to[l];
    copy.offset = shared_range(place, from[l], copy.bytes, 16);
    if (copy.bytes == 0) continue;
    check_source(place, copy.offset, copy.bytes);
    check_target(place, copy, copy.global, copy.bytes);
    begin_store(place, std::move(copy));
  }
}

void commit_group(Warp& warp, const Inst&, uint32_t mask) {
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1)
    warp.block->bulk.commit(warp.first_thread() + __builtin_ctz(lanes));
}

template <bool kRead>
void wait_group(Warp& warp, const Inst& inst, uint32_t mask) {
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1)
    warp.block->bulk.wait(warp.first_thread() + __builtin_ctz(lanes),
                          static_cast<uint32_t>(inst.operand[0]), kRead);
}

// A cache policy: nothing here looks at it.
void create_policy(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) uint64_t policy[kLanes];
  std::fill(policy, policy + kLanes, uint64_t{1});
  store_lanes(warp.at<uint64_t>(inst.operand[0]), policy, mask);
}

void prefetch_map(Warp& warp, const Inst& inst, uint32_t mask) {
  alignas(64) uint64_t map[kLanes];
  read_addresses(warp, inst.operand, map);
  const int l = __builtin_ctz(mask);
  read_map(warp, pc_of(warp, inst), l, map[l]);
}

void nothing(Warp&, const Inst&, uint32_t) {}

template <int kRank>
void add_rank(OpTable& t) {
  const std::string r(kRank, 'r');
  const std::string rank = std::to_string(kRank) + "d";
  for (const char* tile : {"", ".tile"}) {
    for (const char* to : {".shared::cluster", ".shared::cta"}) {
      const std::string name =
          "cp.async.bulk.tensor." + rank + to + ".global" + tile + ".mbarrier::complete_tx::bytes";
      t.add(name, "MM" + r + "M", load_box<kRank>);
      t.add(name + ".L2::cache_hint", "MM" + r + "Md", load_box<kRank>);
    }
    const std::string end = std::string(tile) + ".bulk_group";
    const std::string store = "cp.async.bulk.tensor." + rank + ".global.shared::cta" + end;
    const std::string add = "cp.reduce.async.bulk.tensor." + rank + ".global.shared::cta.add" + end;
    t.add(store, "M" + r + "M", store_box<kRank, false>);
    t.add(store + ".L2::cache_hint", "M" + r + "Md", store_box<kRank, false>);
    t.add(add, "M" + r + "M", store_box<kRank, true>);
    t.add(add + ".L2::cache_hint", "M" + r + "Md", store_box<kRank, true>);
    t.add("cp.async.bulk.prefetch.tensor." + rank + ".L2.global" + tile, "M" + r, nothing);
  }
}

}  // namespace

void add_bulk_ops(OpTable& t) {
  add_rank<1>(t);
  add_rank<2>(t);
  add_rank<3>(t);
  add_rank<4>(t);
  add_rank<5>(t);
  for (const char* to : {"shared::cluster", "shared::cta"}) {
    const std::string name =
        std::string("cp.async.bulk.") + to + ".global.mbarrier::complete_tx::bytes";
    t.add(name, "MMrM", load_linear);
    t.add(name + ".L2::cache_hint", "MMrMd", load_linear);
  }
  const std::string store = "cp.async.bulk.global.shared::cta.bulk_group";
  t.add(store, "MMr", store_linear<false, Element::kF32>);
  t.add(store + ".L2::cache_hint", "MMrd", store_linear<false, Element::kF32>);
  const std::string add = "cp.reduce.async.bulk.global.shared::cta.bulk_group";
  for (const char* hint : {"", ".L2::cache_hint"}) {
    const std::string h = hint;
    const std::string signature = h.empty() ? "MMr" : "MMrd";
    t.add(add + h + ".add.f32", signature, store_linear<true, Element::kF32>);
    t.add(add + h + ".add.f64", signature, store_linear<true, Element::kF64>);
    t.add(add + h + ".add.u32", signature, store_linear<true, Element::kInteger>);
    t.add(add + h + ".add.s32", signature, store_linear<true, Element::kInteger>);
    t.add(add + h + ".add.noftz.f16", signature, store_linear<true, Element::kF16>);
    t.add(add + h + ".add.noftz.bf16", signature, store_linear<true, Element::kBf16>);
  }
  t.add("cp.async.bulk.commit_group", "", commit_group);
  t.add("cp.async.bulk.wait_group", "i", wait_group<false>);
  t.add("cp.async.bulk.wait_group.read", "i", wait_group<true>);
  for (const char* kind : {"evict_last", "evict_first", "evict_normal", "evict_unchanged"}) {
    t.add(std::string("createpolicy.fractional.L2::") + kind + ".b64", "d=r", create_policy);
    t.add(std::string("createpolicy.fractional.L2::") + kind + ".b64", "d=", create_policy);
  }
  t.add("prefetch.tensormap", "M", prefetch_map);
}

}  // namespace ptx
