#include "race.h"

#include <algorithm>

namespace ptx {

namespace {
uint32_t g_stamp = 1;

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

uint32_t Clocks::next_stamp() { return ++g_stamp; }

void Clocks::start(int threads) {
  const uint32_t stamp = next_stamp();
  own_.assign(threads, stamp);
  floor_.assign(threads, stamp);
  known_.assign(threads, nullptr);
}

void Clocks::join_all() {
  const uint32_t stamp = next_stamp();
  std::fill(own_.begin(), own_.end(), stamp);
  std::fill(floor_.begin(), floor_.end(), stamp);
  std::fill(known_.begin(), known_.end(), nullptr);
}

void Clocks::join(const std::vector<int>& from, const std::vector<int>& to) {
  auto known = std::make_shared<Known>(own_.size(), 0);
  uint32_t floor = 0;
  const Known* merged = nullptr;
  for (const int t : from) {
    floor = std::max(floor, floor_[t]);
    if (!known_[t] || known_[t].get() == merged) continue;
    merged = known_[t].get();
    for (size_t u = 0; u < own_.size(); ++u) (*known)[u] = std::max((*known)[u], (*merged)[u]);
  }
  for (const int t : from) (*known)[t] = own_[t];
  const uint32_t stamp = next_stamp();
  for (const int t : from) own_[t] = stamp;
  for (const int t : to) {
    floor_[t] = floor;
    known_[t] = known;
  }
}

void SharedShadow::start(uint32_t bytes, int threads) {
  words_ = (bytes + 3) / 4;
  warps_ = (threads + 31) / 32;
  // Old stamps lie below every floor of the new block, so only the flags are cleared.
  if (write_stamp_.size() < words_) {
    write_stamp_.assign(words_, 0);
    write_pc_.assign(words_, 0);
    write_thread_.assign(words_, 0);
    write_bytes_.assign(words_, 0);
  }
  if (readers_.size() < static_cast<size_t>(words_) * warps_) {
    readers_.assign(static_cast<size_t>(words_) * warps_, {});
  }
  flags_.assign(words_, 0);
}

bool SharedShadow::fail(Conflict::Kind kind, int thread, uint32_t pc, bool was_write,
                        uint32_t word) {
  conflict_ = {kind, thread, pc, was_write, word * 4};
  return false;
}

bool SharedShadow::read_slow(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes) {
  if (flags_[word] & kInFlight) {
    return fail(Conflict::kInFlight, write_thread_[word], write_pc_[word], true, word);
  }
  if ((flags_[word] & bytes) != bytes) return fail(Conflict::kUninitialised, -1, 0, false, word);
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
  if (flags_[word] & kInFlight) {
    return fail(Conflict::kInFlight, write_thread_[word], write_pc_[word], true, word);
  }
  const uint32_t floor = clocks.floor(thread);
  if (write_stamp_[word] >= floor && (write_bytes_[word] & bytes) != 0 &&
      !(atomic && (flags_[word] & kAtomic)) &&
      !clocks.knows(thread, write_thread_[word], write_stamp_[word])) {
    return fail(Conflict::kRace, write_thread_[word], write_pc_[word], true, word);
  }
  if (bytes != 0xF) return true;  // a neighbour's bytes may have been read
  for (int warp = 0; warp < warps_; ++warp) {
    const Reader& reader = readers_[static_cast<size_t>(warp) * words_ + word];
    if (reader.stamp < floor) continue;
    for (uint32_t lanes = reader.lanes; lanes != 0; lanes &= lanes - 1) {
      const int other = warp * 32 + __builtin_ctz(lanes);
      if (!clocks.knows(thread, other, reader.stamp)) {
        return fail(Conflict::kRace, other, reader.pc, false, word);
      }
    }
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

}  // namespace ptx
