// The shadow of a block's shared memory: who touched each 4-byte word, and what may still do so.
#pragma once

#include <cstdint>
#include <vector>

#include "async_ops.h"
#include "clocks.h"

namespace ptx {

// What one check found, of the earlier access. thread < 0: nobody.
struct Conflict {
  enum Kind {
    kNone,
    kRace,
    kInFlight,   // an asynchronous copy may still write it
    kStillRead,  // an asynchronous operation may still read it
    kUninitialised,
    kProxy,    // an ordinary write that the async proxy need not see
    kBarrier,  // part of an mbarrier
  } kind = kNone;
  int thread = -1;
  uint32_t pc = 0;
  bool was_write = false;
  uint32_t offset = 0;  // byte offset in shared memory
};

class SharedShadow {
 public:
  // One reader a warpgroup (its wgmmas) and one for bulk stores.
  static constexpr int kAsyncReaders = 9;
  static constexpr int kBulkReader = 8;

  void start(uint32_t bytes, int threads, AsyncOps* async);

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

  // The async proxy, for an operation that `thread` starts. Multiples of 16 bytes. A write is in
  // flight until its phase is complete, a read until the completion `until`.
  bool async_write(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes,
                   uint32_t write);
  bool async_read(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes);
  // The same for the 16 bytes at `offset` and the warps that begin at threads[4]. `good` remembers
  // the last writers that passed.
  struct Passed {
    uint32_t copy = 0;  // AsyncWrite
    int thread = -1;    // and stamp of an ordinary write
    uint32_t stamp = 0;
  };
  bool async_read_by(const Clocks& clocks, int first_thread, uint32_t offset, Passed& good,
                     int& failed_warp);
  void mark_async_read(uint32_t offset, uint32_t bytes, int reader, uint32_t until) {
    if (async_readers_.empty()) make_async();
    for (uint32_t chunk = offset >> 4; chunk < (offset + bytes + 15) >> 4; ++chunk)
      async_readers_[chunk].until[reader] = until;
  }

  // The 8 bytes become an mbarrier, which plain accesses must not touch, or data again.
  bool make_barrier(const Clocks& clocks, int thread, uint32_t offset, uint32_t pc);
  void drop_barrier(uint32_t offset);

  const Conflict& conflict() const { return conflict_; }

 private:
  static constexpr uint8_t kInFlight = 0x10;
  static constexpr uint8_t kAtomic = 0x20;
  static constexpr uint8_t kBarrier = 0x40;

  bool read_word(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes, uint32_t pc) {
    if (write_stamp_[word] >= clocks.floor(thread) ||
        (flags_[word] & (bytes | kInFlight | kBarrier)) != bytes) {
      if (!read_slow(clocks, thread, word, bytes)) return false;
    }
    const uint32_t warp = static_cast<uint32_t>(thread) >> 5;
    Reader& reader = readers_[static_cast<size_t>(warp) * words_ + word];
    const uint32_t stamp = clocks.own(thread);
    const uint32_t bit = 1u << (thread & 31);
    if (reader.stamp == stamp) {
      reader.lanes |= bit;
    } else {
      reader = {stamp, bit, 0};
    }
    reader.pc = pc;
    reader_warps_[word] |= 1u << warp;
    return true;
  }
  bool read_slow(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes);
  bool read_bytes(const Clocks& clocks, int thread, uint32_t offset, uint32_t bytes, uint32_t pc);
  bool check_write(const Clocks& clocks, int thread, uint32_t word, uint8_t bytes, bool atomic);
  bool check_readers(const Clocks& clocks, int thread, uint32_t word);
  bool check_async_readers(const Clocks& clocks, int thread, uint32_t word);
  bool check_async_write(const Clocks& clocks, int thread, uint32_t word);
  // The last write, as an async operation of `thread` sees it.
  bool check_visible(const Clocks& clocks, int thread, uint32_t word);
  bool fail(Conflict::Kind kind, int thread, uint32_t pc, bool was_write, uint32_t word);
  void make_async();

  // The write stamp of words that a bulk copy wrote: never below a floor.
  static constexpr uint32_t kAsyncStamp = 0xFFFFFFFFu;

  struct Reader {  // the last reads of one word by one warp
    uint32_t stamp = 0;
    uint32_t lanes = 0;
    uint32_t pc = 0;
  };
  struct AsyncReaders {  // of 16 bytes: completions, 0: none
    uint32_t until[kAsyncReaders] = {};
  };
  uint32_t words_ = 0;
  int warps_ = 0;
  bool had_async_ = false;  // words with kAsyncStamp may be left
  AsyncOps* async_ = nullptr;
  std::vector<uint32_t> write_stamp_;   // [words]
  std::vector<uint32_t> write_pc_;      // [words]; after a bulk copy: the AsyncWrite
  std::vector<uint16_t> write_thread_;  // [words]
  std::vector<uint8_t> write_bytes_;    // [words], bytes of the last write
  std::vector<uint8_t> flags_;          // [words], low 4 bits: initialised bytes
  std::vector<uint32_t> reader_warps_;  // [words], warps that have read it since the last write
  std::vector<Reader> readers_;         // [warps][words]
  std::vector<AsyncReaders> async_readers_;  // [words / 4], empty until there is one
  Conflict conflict_;
};

}  // namespace ptx
