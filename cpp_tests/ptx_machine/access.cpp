#include "access.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "global_shadow.h"

namespace ptx {

namespace {

std::string text(const char* format, auto... args) {
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), format, args...);
  return buffer;
}

unsigned long long ull(uint64_t x) { return x; }

[[noreturn]] void fail_bounds(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes,
                              Access access) {
  const Allocation* near = global_memory().nearest(address);
  std::string message = text("%s of %u bytes at global address 0x%llx, outside every allocation",
                             verb(access), bytes, ull(address));
  const bool inside = near != nullptr && address >= near->begin && address < near->end;
  if (inside && global_memory().is_elsewhere(*near)) {
    message += text(" of this device: %s is on device %d", near->label.c_str(), near->device);
  } else if (inside) {
    message += text(": it crosses the end of %s (%llu bytes) by %llu bytes", near->label.c_str(),
                    ull(near->end - near->begin), ull(address + bytes - near->end));
  } else if (near != nullptr) {
    const bool below = address < near->begin;
    message +=
        text("; nearest: %s, %llu bytes, %llu bytes %s its %s", near->label.c_str(),
             ull(near->end - near->begin), ull(below ? near->begin - address : address - near->end),
             below ? "before" : "behind", below ? "begin" : "end");
  }
  warp.block->fail(Error::kOutOfBounds, warp, pc, lane, message);
}

[[noreturn]] void fail_alignment(Warp& warp, uint32_t pc, int lane, const char* space,
                                 uint64_t address, uint32_t bytes, Access access) {
  warp.block->fail(Error::kMisaligned, warp, pc, lane,
                   text("%s of %u bytes at %s address 0x%llx, which is not a multiple of %u",
                        verb(access), bytes, space, ull(address), bytes));
}

void check_writable(Warp& warp, uint32_t pc, int lane, const Allocation& range, Access access) {
  if (!range.read_only || access == Access::kRead) return;
  warp.block->fail(Error::kOutOfBounds, warp, pc, lane,
                   text("%s of %s, which is read-only", verb(access), range.label.c_str()));
}

char* resolve_shared(Request& r, int lane, uint64_t address) {
  Block& block = *r.warp->block;
  const uint32_t offset = shared_offset(*r.warp, r.pc, lane, address, r.bytes);
  if (block.checks) {
    const int thread = r.warp->index * kLanes + lane;
    const bool good = r.access == Access::kRead
                          ? block.shadow->read(block.clocks, thread, offset, r.bytes, r.pc)
                          : block.shadow->write(block.clocks, thread, offset, r.bytes, r.pc,
                                                r.access == Access::kAtomic);
    if (!good) fail_shadow(*r.warp, r.pc, lane, r.access);
  }
  return block.shared.data() + offset;
}

char* resolve_local(Request& r, int lane, uint64_t address) {
  Block& block = *r.warp->block;
  const uint32_t size = block.kernel->local_bytes;
  if (address + r.bytes > size) {
    block.fail(Error::kOutOfBounds, *r.warp, r.pc, lane,
               text("%s of %u bytes at local offset %llu; the thread has %u bytes of local memory",
                    verb(r.access), r.bytes, ull(address), size));
  }
  if (address % r.bytes != 0)
    fail_alignment(*r.warp, r.pc, lane, "local", address, r.bytes, r.access);
  ++block.counters->local_accesses;
  return r.warp->local + static_cast<size_t>(lane) * size + address;
}

char* resolve_param(Request& r, int lane, uint64_t address) {
  Block& block = *r.warp->block;
  if (r.access != Access::kRead || address + r.bytes > block.params.size()) {
    block.fail(Error::kOutOfBounds, *r.warp, r.pc, lane,
               text("%s of %u bytes at parameter offset %llu; the parameters have %llu bytes",
                    verb(r.access), r.bytes, ull(address), ull(block.params.size())));
  }
  return block.params.data() + address;
}

uint32_t max_words_per_bank(const uint32_t* words, int count) {
  uint32_t seen = 0;
  uint32_t tag[32];
  bool conflict = false;
  for (int i = 0; i < count; ++i) {
    const uint32_t bank = words[i] & 31;
    const uint32_t bit = 1u << bank;
    if ((seen & bit) == 0) {
      seen |= bit;
      tag[bank] = words[i];
    } else if (tag[bank] != words[i]) {
      conflict = true;
      break;
    }
  }
  if (!conflict) return count > 0 ? 1 : 0;
  uint32_t sorted[128];
  std::copy(words, words + count, sorted);
  std::sort(sorted, sorted + count);
  uint32_t per_bank[32] = {};
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    if (i > 0 && sorted[i] == sorted[i - 1]) continue;
    most = std::max(most, ++per_bank[sorted[i] & 31]);
  }
  return most;
}

}  // namespace

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

void read_addresses(Warp& warp, const int32_t* operand, uint64_t (&address)[kLanes]) {
  const int64_t displacement = operand[1];
  if (operand[2] != 0) {
    const uint64_t* base = warp.at<const uint64_t>(operand[0]);
    for (int l = 0; l < kLanes; ++l) address[l] = base[l] + static_cast<uint64_t>(displacement);
  } else {
    const uint32_t* base = warp.at<const uint32_t>(operand[0]);
    for (int l = 0; l < kLanes; ++l) address[l] = base[l] + static_cast<uint32_t>(displacement);
  }
}

uint32_t shared_offset(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes) {
  Block& block = *warp.block;
  const uint64_t offset = address - kSharedBase;
  if (offset > block.shared_bytes || offset + bytes > block.shared_bytes) {
    block.fail(
        Error::kOutOfBounds, warp, pc, lane,
        text("access of %u bytes at shared offset %lld; the block has %u bytes of shared memory",
             bytes, static_cast<long long>(offset), block.shared_bytes));
  }
  if (offset & (bytes - 1)) fail_alignment(warp, pc, lane, "shared", address, bytes, Access::kRead);
  return static_cast<uint32_t>(offset);
}

const char* resolve_global(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes,
                           Access access, uint8_t how) {
  Block& block = *warp.block;
  Allocation*& range = block.range_cache[pc];
  if (range == nullptr || address < range->begin || address + bytes > range->end) {
    Allocation* found = global_memory().find(address);
    if (found == nullptr) fail_bounds(warp, pc, lane, address, bytes, access);
    if (address + bytes > found->end) fail_bounds(warp, pc, lane, address, bytes, access);
    range = found;
  }
  if (address & (bytes - 1)) fail_alignment(warp, pc, lane, "global", address, bytes, access);
  check_writable(warp, pc, lane, *range, access);
  if (block.checks) check_global({warp, pc, lane, address, bytes, access, how}, *range);
  return reinterpret_cast<const char*>(address);
}

void check_bulk_global(const GlobalAccess& at) {
  Block& block = *at.warp.block;
  Allocation* range = global_memory().find(at.address);
  if (range == nullptr || at.address + at.bytes > range->end)
    fail_bounds(at.warp, at.pc, at.lane, at.address, at.bytes, at.access);
  check_writable(at.warp, at.pc, at.lane, *range, at.access);
  if (block.checks) check_global(at, *range);
  Counters& counters = *block.counters;
  (at.access == Access::kRead ? counters.global_read_bytes : counters.global_written_bytes) +=
      at.bytes;
}

void resolve(Request& r, Space space) {
  Block& block = *r.warp->block;
  bool global = space == Space::kGlobal || space == Space::kConst;
  for (uint32_t lanes = r.mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const uint64_t address = r.address[l];
    Space here = space;
    uint64_t inside = address;
    if (space == Space::kGeneric) {
      const uint64_t window = address & kWindowMask;
      inside = address & ~kWindowMask;
      here = window == kSharedWindow  ? Space::kShared
             : window == kLocalWindow ? Space::kLocal
             : window == kParamWindow ? Space::kParam
                                      : Space::kGlobal;
      if (here == Space::kGlobal) inside = address, global = true;
    }
    switch (here) {
      case Space::kShared: r.host[l] = resolve_shared(r, l, inside); break;
      case Space::kLocal: r.host[l] = resolve_local(r, l, inside); break;
      case Space::kParam: r.host[l] = resolve_param(r, l, inside); break;
      default:
        r.host[l] =
            const_cast<char*>(resolve_global(*r.warp, r.pc, l, inside, r.bytes, r.access, r.how));
    }
  }
  if (global) {
    if (r.access != Access::kWrite) count_global(block, r.address, r.mask, r.bytes, false);
    if (r.access != Access::kRead) count_global(block, r.address, r.mask, r.bytes, true);
  } else if (space == Space::kShared) {
    count_shared(block, r.address, r.mask, r.bytes);
  }
}

void count_global(Block& block, const uint64_t* address, uint32_t mask, uint32_t bytes,
                  bool write) {
  const uint32_t total = static_cast<uint32_t>(std::popcount(mask)) * bytes;
  (write ? block.counters->global_written_bytes : block.counters->global_read_bytes) += total;
  uint64_t sectors[kLanes];
  int count = 0;
  bool ascending = true;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const uint64_t sector = address[__builtin_ctz(lanes)] >> 5;
    if (count > 0 && sectors[count - 1] == sector) continue;
    if (count > 0 && sectors[count - 1] > sector) ascending = false;
    sectors[count++] = sector;
  }
  if (!ascending) {
    std::sort(sectors, sectors + count);
    count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
  }
  block.counters->sectors += count;
  block.counters->sectors_ideal += (total + 31) / 32;
}

void count_shared(Block& block, const uint64_t* address, uint32_t mask, uint32_t bytes) {
  const int lanes_per_pass = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  const uint32_t pass_bits = lanes_per_pass == 32 ? kAllLanes : (1u << lanes_per_pass) - 1;
  uint32_t words[kLanes];
  for (int first = 0; first < kLanes; first += lanes_per_pass) {
    int count = 0;
    for (uint32_t lanes = mask & (pass_bits << first); lanes != 0; lanes &= lanes - 1) {
      const uint32_t word = static_cast<uint32_t>(address[__builtin_ctz(lanes)] >> 2);
      for (uint32_t i = 0; i < std::max(bytes / 4, 1u); ++i) words[count++] = word + i;
    }
    if (count == 0) continue;
    block.counters->wavefronts += max_words_per_bank(words, count);
    block.counters->wavefronts_ideal += 1;
  }
}

void fail_shadow(Warp& warp, uint32_t pc, int lane, const char* what) {
  Block& block = *warp.block;
  const Conflict& c = block.shadow->conflict();
  const std::string access = text("%s of shared memory at offset %u", what, c.offset);
  const std::string other = c.kind == Conflict::kUninitialised
                                ? ""
                                : "thread " + std::to_string(c.thread) + " at " + block.where(c.pc);
  switch (c.kind) {
    case Conflict::kUninitialised:
      block.fail(Error::kUninitialised, warp, pc, lane, access + " that nothing has written");
    case Conflict::kInFlight:
      block.fail(Error::kInFlight, warp, pc, lane,
                 access + " while the copy of " + other + " is in flight");
    case Conflict::kStillRead:
      block.fail(Error::kInFlight, warp, pc, lane,
                 access + ", which the operation of " + other +
                     " may still read: nobody has waited for it");
    case Conflict::kProxy:
      block.fail(
          Error::kProxy, warp, pc, lane,
          access + " by the async proxy; no fence.proxy.async stands behind the write by " + other);
    case Conflict::kBarrier:
      block.fail(Error::kBarrier, warp, pc, lane,
                 access + ", which is part of the mbarrier that " + other + " initialised");
    default:
      block.fail(Error::kRace, warp, pc, lane,
                 access + " is not ordered after the " + (c.was_write ? "write" : "read") + " by " +
                     other);
  }
}

void fail_shadow(Warp& warp, uint32_t pc, int lane, Access access) {
  fail_shadow(warp, pc, lane, verb(access));
}

}  // namespace ptx
