// cp.async: 4, 8 or 16 bytes from global to shared memory, in flight until the issuing thread
// waits. The data lands at a random legal moment: when issued, or when waited for.
#include <algorithm>

#include "access.h"
#include "ops.h"

namespace ptx {

namespace {

void land(Warp& warp, PendingCopy& copy) {
  Block& block = *warp.block;
  char* to = block.shared.data() + copy.offset;
  if (copy.copied != 0) std::memcpy(to, copy.source, copy.copied);  // source is null for zero fill
  std::memset(to + copy.copied, 0, copy.bytes - copy.copied);
  copy.landed = true;
}

enum class Source { kWhole, kSize, kIgnore };

template <Source kSource>
void copy_async(Warp& warp, const Inst& inst, uint32_t mask) {
  Block& block = *warp.block;
  const uint32_t pc = pc_of(warp, inst);
  const int32_t* o = inst.operand;
  const uint32_t bytes = static_cast<uint32_t>(o[6]);
  alignas(64) uint64_t to[kLanes];
  alignas(64) uint64_t from[kLanes];
  read_addresses(warp, o, to);
  read_addresses(warp, o + 3, from);
  uint32_t ignored = 0;
  if constexpr (kSource == Source::kIgnore) ignored = warp.pred(o[7]) ^ static_cast<uint32_t>(o[8]);
  uint32_t reading = 0;
  const bool now = (block.random->next() & 1) != 0;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    PendingCopy copy;
    copy.bytes = copy.copied = bytes;
    if constexpr (kSource == Source::kSize)
      copy.copied = std::min(bytes, warp.at<const uint32_t>(o[7])[l]);
    if ((ignored >> l) & 1) copy.copied = 0;
    copy.offset = shared_offset(warp, pc, l, to[l], bytes);
    if (copy.copied != 0) {
      if (from[l] % bytes != 0)
        resolve_global(warp, pc, l, from[l], bytes, Access::kRead);  // misaligned
      copy.source = reinterpret_cast<const char*>(from[l]);
      for (uint32_t done = 0; done < copy.copied;) {
        const uint32_t step = std::bit_floor(copy.copied - done);
        resolve_global(warp, pc, l, from[l] + done, step, Access::kRead);
        done += step;
      }
      reading |= 1u << l;
    }
    copy.group = warp.copies[l].committed;
    if (block.checks &&
        !block.shadow->begin_copy(block.clocks, warp.index * kLanes + l, copy.offset, bytes, pc)) {
      fail_shadow(warp, pc, l, Access::kWrite);
    }
    if (now) land(warp, copy);
    warp.copies[l].pending.push_back(copy);
  }
  block.counters->cp_async_bytes += static_cast<uint64_t>(bytes) * std::popcount(reading);
  count_global(block, from, reading, bytes, false);
  count_shared(block, to, mask, bytes);
}

void wait_lane(Warp& warp, int lane, uint32_t first_pending_group) {
  Block& block = *warp.block;
  std::vector<PendingCopy>& pending = warp.copies[lane].pending;
  size_t kept = 0;
  for (PendingCopy& copy : pending) {
    if (copy.group >= first_pending_group) {
      pending[kept++] = copy;
      continue;
    }
    if (!copy.landed) land(warp, copy);
    if (block.checks)
      block.shadow->land(block.clocks, warp.index * kLanes + lane, copy.offset, copy.bytes);
  }
  pending.resize(kept);
}

void commit_group(Warp& warp, const Inst&, uint32_t mask) {
  for (int l = 0; l < kLanes; ++l) warp.copies[l].committed += (mask >> l) & 1;
}

void wait_group(Warp& warp, const Inst& inst, uint32_t mask) {
  const uint32_t allowed = static_cast<uint32_t>(inst.operand[0]);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const uint32_t committed = warp.copies[l].committed;
    wait_lane(warp, l, committed > allowed ? committed - allowed : 0);
  }
}

void wait_all(Warp& warp, const Inst&, uint32_t mask) {
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    ++warp.copies[l].committed;
    wait_lane(warp, l, warp.copies[l].committed);
  }
}

}  // namespace

void add_copy_ops(OpTable& t) {
  for (const char* cache : {"ca", "cg"}) {
    for (const char* shared : {"shared", "shared::cta"}) {
      for (const char* prefetch : {"", ".L2::64B", ".L2::128B", ".L2::256B"}) {
        const std::string name =
            std::string("cp.async.") + cache + "." + shared + ".global" + prefetch;
        t.add(name, "MMi", copy_async<Source::kWhole>);
        t.add(name, "MMir", copy_async<Source::kSize>);
        t.add(name, "MMiq", copy_async<Source::kIgnore>);
      }
    }
  }
  t.add("cp.async.commit_group", "", commit_group);
  t.add("cp.async.wait_group", "i", wait_group);
  t.add("cp.async.wait_all", "", wait_all);
}

}  // namespace ptx
