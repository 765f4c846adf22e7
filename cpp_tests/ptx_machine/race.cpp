#include "race.h"

#include <algorithm>
#include <cstring>

namespace ptx {

namespace {

// Which bytes of word `word` the range [offset, offset + bytes) covers.
uint8_t covered(uint32_t word, uint32_t offset, uint32_t bytes) {
  uint8_t mask = 0;
  for (uint32_t b = 0; b < 4; ++b) {
    const uint32_t at = word * 4 + b;
    if (at >= offset && at < offset + bytes) mask |= static_cast<uint8_t>(1u << b);
  }
  return mask;
}

}  // namespace

void SharedShadow::start(uint32_t bytes, int threads, AsyncOps* async) {
  words_ = (bytes + 3) / 4;
  warps_ = (threads + 31) / 32;
  async_ = async;
  async_readers_.clear();
  // Old stamps lie below every floor of the new block, so only the flags are cleared.
  if (write_stamp_.size() < words_) {
    write_stamp_.assign(words_, 0);
    write_pc_.assign(words_, 0);
    write_thread_.assign(words_, 0);
    write_bytes_.assign(words_, 0);
    reader_warps_.assign(words_, 0);
  }
  if (had_async_) std::replace(write_stamp_.begin(), write_stamp_.end(), kAsyncStamp, 0u);
  had_async_ = false;
  std::fill(reader_warps_.begin(), reader_warps_.end(), 0u);
  if (readers_.size() < static_cast<size_t>(words_) * warps_) {
    readers_.assign(static_cast<size_t>(words_) * warps_, {});
  }
  flags_.assign(words_, 0);
}

void SharedShadow::make_async() { async_readers_.assign(words_ / 4 + 1, {}); }

bool SharedShadow::fail(Conflict::Kind kind, int thread, uint32_t pc, bool was_write,
                        uint32_t word) {
  conflict_ = {kind, thread, pc, was_write, word * 4};
  return false;
}

bool SharedShadow::check_async_write(const Clocks& clocks, int thread, uint32_t word) {
  const AsyncWrite& w = async_->write(write_pc_[word]);
  if (!w.landed || !async_->completion(w.phase).complete)
    return fail(Conflict::kInFlight, w.thread, w.pc, true, word);
  if (async_->is_ordered(w.phase, clocks, thread)) return true;
  return fail(Conflict::kRace, w.thread, w.pc, true, word);
}

bool SharedShadow::read_slow(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes) {
  if (flags_[word] & kBarrier)
    return fail(Conflict::kBarrier, write_thread_[word], write_pc_[word], true, word);
  if (flags_[word] & kInFlight)
    return fail(Conflict::kInFlight, write_thread_[word], write_pc_[word], true, word);
  if ((flags_[word] & bytes) != bytes) return fail(Conflict::kUninitialised, -1, 0, false, word);
  if (write_stamp_[word] == kAsyncStamp) return check_async_write(clocks, thread, word);
  if ((write_bytes_[word] & bytes) != 0 &&
      !clocks.knows(thread, write_thread_[word], write_stamp_[word])) {
    return fail(Conflict::kRace, write_thread_[word], write_pc_[word], true, word);
  }
  return true;
}

bool SharedShadow::read_bytes(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes,
                              uint32_t pc) {
  for (uint32_t w = offset >> 2; w * 4 < offset + bytes; ++w) {
    if (!read_word(clocks, thread, w, covered(w, offset, bytes), pc)) return false;
  }
  return true;
}

bool SharedShadow::check_write(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes,
                               bool atomic) {
  if (flags_[word] & kBarrier)
    return fail(Conflict::kBarrier, write_thread_[word], write_pc_[word], true, word);
  if (flags_[word] & kInFlight)
    return fail(Conflict::kInFlight, write_thread_[word], write_pc_[word], true, word);
  if (write_stamp_[word] == kAsyncStamp) {
    if (!check_async_write(clocks, thread, word)) return false;
  } else if (write_stamp_[word] >= clocks.floor(thread) && (write_bytes_[word] & bytes) != 0 &&
             !(atomic && (flags_[word] & kAtomic)) &&
             !clocks.knows(thread, write_thread_[word], write_stamp_[word])) {
    return fail(Conflict::kRace, write_thread_[word], write_pc_[word], true, word);
  }
  if (!async_readers_.empty() && !check_async_readers(clocks, thread, word)) return false;
  if (bytes != 0xF) return true;  // a neighbour's bytes may have been read
  return check_readers(clocks, thread, word);
}

bool SharedShadow::check_readers(const Clocks& clocks, int thread, uint32_t word) {
  const uint32_t floor = clocks.floor(thread);
  for (uint32_t warps = reader_warps_[word]; warps != 0; warps &= warps - 1) {
    const int warp = __builtin_ctz(warps);
    const Reader& reader = readers_[static_cast<size_t>(warp) * words_ + word];
    if (reader.stamp < floor) continue;
    for (uint32_t lanes = reader.lanes; lanes != 0; lanes &= lanes - 1) {
      const int other = warp * 32 + __builtin_ctz(lanes);
      if (!clocks.knows(thread, other, reader.stamp)) {
        return fail(Conflict::kRace, other, reader.pc, false, word);
      }
    }
  }
  // Whoever comes after this write comes after them too.
  reader_warps_[word] = 0;
  return true;
}

bool SharedShadow::check_async_readers(const Clocks& clocks, int thread, uint32_t word) {
  AsyncReaders& readers = async_readers_[word >> 2];
  for (const uint32_t until : readers.until) {
    if (until == 0) continue;
    const Completion& c = async_->completion(until);
    if (!c.complete) return fail(Conflict::kStillRead, c.thread, c.pc, false, word);
    if (!async_->is_ordered(until, clocks, thread))
      return fail(Conflict::kRace, c.thread, c.pc, false, word);
  }
  return true;
}

bool SharedShadow::write(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes,
                         uint32_t pc, bool atomic) {
  for (uint32_t w = offset >> 2; w * 4 < offset + bytes; ++w) {
    const uint8_t mask = ((offset | bytes) & 3) == 0 ? 0xF : covered(w, offset, bytes);
    if (!check_write(clocks, thread, w, mask, atomic)) return false;
    write_stamp_[w] = clocks.own(thread);
    write_thread_[w] = static_cast<uint16_t>(thread);
    write_bytes_[w] = mask;
    write_pc_[w] = pc;
    flags_[w] = static_cast<uint8_t>((flags_[w] & 0xF) | mask | (atomic ? kAtomic : 0));
  }
  return true;
}

bool SharedShadow::begin_copy(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes,
                              uint32_t pc) {
  if (!write(clocks, thread, offset, bytes, pc)) return false;
  for (uint32_t w = offset >> 2; w * 4 < offset + bytes; ++w) flags_[w] |= kInFlight;
  return true;
}

void SharedShadow::land(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes) {
  for (uint32_t w = offset >> 2; w * 4 < offset + bytes; ++w) {
    flags_[w] = static_cast<uint8_t>(flags_[w] & ~kInFlight);
    write_stamp_[w] = clocks.own(thread);
  }
}

bool SharedShadow::check_visible(const Clocks& clocks, int thread, uint32_t word) {
  const int writer = write_thread_[word];
  const uint32_t stamp = write_stamp_[word];
  if (!clocks.knows(thread, writer, stamp))
    return fail(Conflict::kRace, writer, write_pc_[word], true, word);
  if (!clocks.shows(kSharedProxy, thread, writer, stamp))
    return fail(Conflict::kProxy, writer, write_pc_[word], true, word);
  return true;
}

bool SharedShadow::async_write(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes,
                               uint32_t write) {
  had_async_ = true;
  const uint32_t end = (offset + bytes) >> 2;
  for (uint32_t w = offset >> 2; w < end; ++w) {
    if (!check_write(clocks, thread, w, 0xF, false)) return false;
    // Words that nobody has written yet have no ordinary write to be fenced.
    if (write_stamp_[w] != kAsyncStamp && (flags_[w] & 0xF) != 0 &&
        !check_visible(clocks, thread, w)) {
      return false;
    }
    write_stamp_[w] = kAsyncStamp;
    write_thread_[w] = static_cast<uint16_t>(thread);
    write_bytes_[w] = 0xF;
    write_pc_[w] = write;
    flags_[w] = 0xF;
  }
  return true;
}

bool SharedShadow::async_read(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes) {
  const uint32_t end = (offset + bytes + 3) >> 2;
  uint32_t good_write = 0;  // the words of a tile mostly have one writer
  for (uint32_t w = offset >> 2; w < end; ++w) {
    if ((flags_[w] & (0xF | kInFlight | kBarrier)) != 0xF) {
      if (!read_slow(clocks, thread, w, 0xF)) return false;
    }
    if (write_stamp_[w] == kAsyncStamp) {
      if (write_pc_[w] == good_write) continue;
      if (!check_async_write(clocks, thread, w)) return false;
      good_write = write_pc_[w];
    } else if (!check_visible(clocks, thread, w)) {
      return false;
    }
  }
  return true;
}

bool SharedShadow::async_read_by(const Clocks& clocks, int first_thread, uint32_t offset,
                                 Passed& good, int& failed_warp) {
  const uint32_t word = offset >> 2;
  uint32_t flags;
  std::memcpy(&flags, &flags_[word], 4);
  const uint32_t* stamps = &write_stamp_[word];
  const uint32_t* writes = &write_pc_[word];
  const bool plain = (flags & 0x5F5F5F5F) == 0x0F0F0F0F;
  const bool one_copy = ((stamps[0] & stamps[1] & stamps[2] & stamps[3]) == kAsyncStamp) &&
                        ((writes[0] ^ good.copy) | (writes[1] ^ good.copy) |
                         (writes[2] ^ good.copy) | (writes[3] ^ good.copy)) == 0;
  if (plain && one_copy) return true;
  const auto same_writer = [&](uint32_t w) {
    return stamps[w] == good.stamp && write_thread_[word + w] == good.thread;
  };
  if (plain && same_writer(0) && same_writer(1) && same_writer(2) && same_writer(3)) return true;
  for (failed_warp = 0; failed_warp < 4; ++failed_warp) {
    if (!async_read(clocks, first_thread + 32 * failed_warp, offset, 16)) return false;
  }
  if (stamps[0] == kAsyncStamp) {
    good.copy = writes[0];
  } else {
    good.thread = write_thread_[word];
    good.stamp = stamps[0];
  }
  return true;
}

bool SharedShadow::make_barrier(const Clocks& clocks, int thread, uint32_t offset, uint32_t pc) {
  const uint32_t word = offset >> 2;
  if (!write(clocks, thread, offset, 8, pc)) return false;
  flags_[word] |= kBarrier;
  flags_[word + 1] |= kBarrier;
  return true;
}

void SharedShadow::drop_barrier(uint32_t offset) {
  // What the mbarrier held is no data.
  flags_[offset >> 2] = flags_[(offset >> 2) + 1] = 0;
}

}  // namespace ptx
