// Order between the accesses of threads: vector clocks, and the shadow of shared memory.
//
// A stamp is drawn from one counter that only grows. own[t] is the stamp of thread t's accesses
// since its last synchronisation. Thread t knows (is ordered after) an access of thread u stamped s
// when s < floor[t] (a barrier of the whole block lies between), or known[t][u] >= s (a named or
// warp barrier), or u == t. So a barrier of the whole block costs nothing per pair of threads.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace ptx {

class Clocks {
 public:
  static uint32_t next_stamp();

  void start(int threads);
  bool knows(int thread, int other, uint32_t stamp) const {
    if (stamp < floor_[thread] || thread == other) return true;
    const auto& known = known_[thread];
    return known && (*known)[other] >= stamp;
  }
  uint32_t own(int thread) const { return own_[thread]; }
  uint32_t floor(int thread) const { return floor_[thread]; }

  // All threads of the block meet.
  void join_all();
  // What `from` did becomes ordered before what `to` will do; `to` is part of `from`.
  void join(const std::vector<int>& from, const std::vector<int>& to);

 private:
  using Known = std::vector<uint32_t>;  // [threads], stamp
  std::vector<uint32_t> own_;
  std::vector<uint32_t> floor_;
  std::vector<std::shared_ptr<const Known>> known_;
};

// What one check found; thread < 0: nothing. Of the earlier access.
struct Conflict {
  enum Kind { kNone, kRace, kInFlight, kUninitialised } kind = kNone;
  int thread = -1;
  uint32_t pc = 0;
  bool was_write = false;
  uint32_t offset = 0;  // byte offset in shared memory
};

// Shadow of a block's shared memory, per 4-byte word.
class SharedShadow {
 public:
  void start(uint32_t bytes, int threads);

  // Ranges must lie inside shared memory. Returns true when all is well.
  bool read(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes, uint32_t pc) {
    if (((offset | bytes) & 3) == 0) {
      const uint32_t end = (offset + bytes) >> 2;
      for (uint32_t w = offset >> 2; w < end; ++w) {
        if (!read_word(clocks, thread, w, 0xF, pc)) return false;
      }
      return true;
    }
    return read_bytes(clocks, thread, offset, bytes, pc);
  }
  bool write(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes, uint32_t pc,
             bool atomic = false);
  // A cp.async begins: checked as a write, then untouchable until land().
  bool begin_copy(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes, uint32_t pc);
  void land(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes);

  const Conflict& conflict() const { return conflict_; }

 private:
  static constexpr uint8_t kInFlight = 0x10;
  static constexpr uint8_t kAtomic = 0x20;

  bool read_word(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes, uint32_t pc) {
    if (write_stamp_[word] >= clocks.floor(thread) ||
        (flags_[word] & (bytes | kInFlight)) != bytes) {
      if (!read_slow(clocks, thread, word, bytes)) return false;
    }
    Reader& reader = readers_[static_cast<size_t>(thread >> 5) * words_ + word];
    const uint32_t stamp = clocks.own(thread);
    const uint32_t bit = 1u << (thread & 31);
    if (reader.stamp == stamp) {
      reader.lanes |= bit;
    } else {
      reader = {stamp, bit, 0};
    }
    reader.pc = pc;
    return true;
  }
  bool read_slow(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes);
  bool read_bytes(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes, uint32_t pc);
  bool check_write(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes, bool atomic);
  bool fail(Conflict::Kind kind, int thread, uint32_t pc, bool was_write, uint32_t word);

  struct Reader {  // the last reads of one word by one warp
    uint32_t stamp = 0;
    uint32_t lanes = 0;
    uint32_t pc = 0;
  };
  uint32_t words_ = 0;
  int warps_ = 0;
  std::vector<uint32_t> write_stamp_;   // [words]
  std::vector<uint32_t> write_pc_;      // [words]
  std::vector<uint16_t> write_thread_;  // [words]
  std::vector<uint8_t> write_bytes_;    // [words], bytes of the last write
  std::vector<uint8_t> flags_;          // [words], low 4 bits: initialised bytes
  std::vector<Reader> readers_;         // [warps][words]
  Conflict conflict_;
};

}  // namespace ptx
