#include "access.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

namespace ptx {

namespace {

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

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

struct Word {  // one word of one access
  Warp& warp;
  Block& block;
  uint32_t pc;
  int lane;
  uint64_t address;
  Access access;
  bool bulk;    // by the async proxy
  bool strong;  // not weak
  int thread = warp.first_thread() + lane;
  uint32_t stamp = block.clocks.own(thread);
};

[[noreturn]] void fail_word(const Word& at, Error kind, const char* relation, const char* earlier,
                            uint32_t agent, uint32_t earlier_pc) {
  Block& block = at.block;
  const Allocation* range = global_memory().find(at.address);
  block.fail(
      kind, at.warp, at.pc, at.lane,
      text("%s of global memory (%s + %llu) %s the %s by thread %d of %s at %s", verb(at.access),
           range->label.c_str(), ull(at.address - range->begin), relation, earlier,
           thread_of(agent), block_of(agent) == block.number ? "this block" : "another block",
           block.where(earlier_pc).c_str()));
}

bool is_ordered(const Block& block, int thread, uint32_t agent, uint32_t stamp) {
  return block_of(agent) == block.number
             ? block.clocks.knows(thread, thread_of(agent), stamp)
             : block.clocks.knows_foreign(thread, block_of(agent), thread_of(agent), stamp);
}

// The last write of the word is visible to this access, or it is an error.
void check_last_write(const Word& at, const WordShadow& w) {
  const Block& block = at.block;
  const int thread = at.thread;
  if ((at.access == Access::kAtomic || at.strong) && w.atomic) return;
  const char* const what = w.atomic ? "atomic update" : "write";
  if (w.in_flight)
    fail_word(at, Error::kInFlight, "is not ordered after", "bulk copy, which is in flight,",
              w.write_agent, w.write_pc);
  if (!is_ordered(block, thread, w.write_agent, w.write_stamp))
    fail_word(at, Error::kRace, "is not ordered after", what, w.write_agent, w.write_pc);
  if (!at.bulk || w.async) return;
  const uint32_t writer = block_of(w.write_agent);
  const int other = thread_of(w.write_agent);
  const bool shown =
      writer == block.number
          ? block.clocks.shows(kGlobalProxy, thread, other, w.write_stamp)
          : block.clocks.shows_foreign(kGlobalProxy, thread, writer, other, w.write_stamp);
  if (!shown)
    fail_word(at, Error::kProxy, "by the async proxy, without a fence.proxy.async behind", what,
              w.write_agent, w.write_pc);
}

void note_read(WordShadow& w, const Block& block, uint32_t stamp, uint32_t agent, uint32_t pc) {
  if (w.read_stamp >= block.launch_stamp && block_of(w.read_agent) != block.number) {
    w.foreign_read_stamp = w.read_stamp;
    w.foreign_read_agent = w.read_agent;
  }
  w.read_stamp = stamp;
  w.read_agent = agent;
  w.read_pc = pc;
}

// One word of an access against its shadow; `covered`: which of its bytes.
inline void check_word(const Word& at, WordShadow& w, uint8_t covered) {
  const Block& block = at.block;
  const int thread = at.thread;
  if (w.write_stamp >= block.launch_stamp && (w.write_bytes & covered) != 0)
    check_last_write(at, w);
  const uint32_t agent = agent_of(block.number, thread);
  if (at.access == Access::kRead && at.strong) return;
  if (at.access == Access::kRead) return note_read(w, block, at.stamp, agent, at.pc);
  if (covered == 0xF && w.read_stamp >= block.launch_stamp) {
    if (!is_ordered(block, thread, w.read_agent, w.read_stamp))
      fail_word(at, Error::kRace, "is not ordered after", "read", w.read_agent, w.read_pc);
    if (w.foreign_read_stamp >= block.launch_stamp &&
        !is_ordered(block, thread, w.foreign_read_agent, w.foreign_read_stamp)) {
      fail_word(at, Error::kRace, "is not ordered after", "read", w.foreign_read_agent, w.read_pc);
    }
  }
  w.write_stamp = at.stamp;
  w.write_agent = agent;
  w.write_pc = at.pc;
  w.write_bytes = covered;
  w.atomic = at.access == Access::kAtomic || at.strong;
  w.in_flight = w.async = at.bulk;
}

// The 4-byte words of one lane's access against the shadow of their allocation.
inline void check_global(Word at, Allocation& range, uint32_t bytes) {
  const uint64_t begin = at.address;
  const uint64_t end = begin + bytes;
  for (at.address = begin & ~uint64_t{3}; at.address < end; at.address += 4) {
    uint8_t covered = 0xF;
    if (at.address < begin || at.address + 4 > end) {
      covered = 0;
      for (int b = 0; b < 4; ++b)
        covered |= static_cast<uint8_t>((at.address + b >= begin && at.address + b < end) << b);
    }
    check_word(at, *range.word(at.address), covered);
  }
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
                           Access access, bool strong) {
  Block& block = *warp.block;
  Allocation*& range = block.range_cache[pc];
  if (range == nullptr || address < range->begin || address + bytes > range->end) {
    Allocation* found = global_memory().find(address);
    if (found == nullptr) fail_bounds(warp, pc, lane, address, bytes, access);
    if (address + bytes > found->end) fail_bounds(warp, pc, lane, address, bytes, access);
    range = found;
  }
  if (address & (bytes - 1)) fail_alignment(warp, pc, lane, "global", address, bytes, access);
  if (range->read_only && access != Access::kRead) {
    block.fail(Error::kOutOfBounds, warp, pc, lane,
               text("%s of %s, which is read-only", verb(access), range->label.c_str()));
  }
  if (block.checks)
    check_global({warp, block, pc, lane, address, access, false, strong}, *range, bytes);
  return reinterpret_cast<const char*>(address);
}

void check_bulk_global(Warp& warp, uint32_t pc, int lane, uint64_t address, uint32_t bytes,
                       Access access) {
  Block& block = *warp.block;
  Allocation* range = global_memory().find(address);
  if (range == nullptr || address + bytes > range->end)
    fail_bounds(warp, pc, lane, address, bytes, access);
  if (range->read_only && access != Access::kRead) {
    block.fail(Error::kOutOfBounds, warp, pc, lane,
               text("%s of %s, which is read-only", verb(access), range->label.c_str()));
  }
  if (block.checks)
    check_global({warp, block, pc, lane, address, access, true, false}, *range, bytes);
  Counters& counters = *block.counters;
  (access == Access::kRead ? counters.global_read_bytes : counters.global_written_bytes) += bytes;
}

void end_bulk_write(Block& block, int thread, uint64_t address, uint32_t bytes) {
  Allocation* range = global_memory().find(address);
  const uint32_t agent = agent_of(block.number, thread);
  for (uint64_t at = address & ~uint64_t{3}; at < address + bytes; at += 4) {
    WordShadow& w = *range->word(at);
    if (w.write_agent != agent || !w.async) continue;
    w.in_flight = false;
    w.write_stamp = block.clocks.own(thread);
  }
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
        r.host[l] = const_cast<char*>(
            resolve_global(*r.warp, r.pc, l, inside, r.bytes, r.access, r.strong));
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
