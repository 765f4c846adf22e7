// Global memory: host ranges that kernels may access, with exact bounds and a shadow that remembers
// who touched each 4-byte word last in the current launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace ptx {

// How a word was accessed.
enum How : uint8_t {
  kStrong = 1,      // relaxed, acquire, release, volatile, atomic
  kBlockScope = 2,  // strong for its own block only
  kSum = 4,         // a floating-point addition: its result depends on the order
  kAsync = 8,       // by a bulk copy
  kInFlight = 16,   // by a bulk copy whose thread has not waited for it
};

// Of one 4-byte word. Stamps grow over the whole life of the process (see race.h), so a stamp from
// an earlier launch never conflicts and the shadow is never cleared.
struct WordShadow {
  uint32_t write_stamp = 0;
  uint32_t read_stamp = 0;          // of the last read
  uint32_t foreign_read_stamp = 0;  // of the last read by a block that is not the last reader's
  uint32_t write_pc = 0;
  uint32_t read_pc = 0;
  uint32_t foreign_read_pc = 0;
  uint32_t write_agent = 0;  // see agent_of
  uint32_t read_agent = 0;
  uint32_t foreign_read_agent = 0;
  uint32_t read_load = 0;   // of a bulk load: its AsyncWrite
  uint8_t write_bytes = 0;  // which of the 4 bytes
  uint8_t write_how = 0;    // flags of How
  uint8_t read_how = 0;
};

// A thread of a launch: its block's number, and its index there.
inline uint32_t agent_of(uint32_t block, int thread) {
  return block << 10 | static_cast<uint32_t>(thread);
}
inline uint32_t block_of(uint32_t agent) { return agent >> 10; }
inline int thread_of(uint32_t agent) { return static_cast<int>(agent & 1023); }

inline constexpr int kEveryDevice = -1;

struct Allocation {
  uint64_t begin = 0;
  uint64_t end = 0;
  std::string label;
  bool read_only = false;
  int device = kEveryDevice;             // whose kernels may access it
  void* owned = nullptr;                 // freed with the allocation
  std::unique_ptr<WordShadow[]> shadow;  // [(end - begin + 3) / 4 + 1], made on first access

  WordShadow* word(uint64_t address) {
    if (!shadow) shadow = std::make_unique<WordShadow[]>((end - begin) / 4 + 3);
    return &shadow[(address >> 2) - (begin >> 2)];
  }
};

class GlobalMemory {
 public:
  Allocation& add(const void* pointer, size_t bytes, const std::string& label, bool read_only);
  void remove(uint64_t begin);
  // The device that kernels run on from now on.
  void set_device(int device) { device_ = device; }
  bool is_elsewhere(const Allocation& range) const {
    return range.device != kEveryDevice && range.device != device_;
  }
  // The allocation of the device that holds the byte at `address`, or null.
  Allocation* find(uint64_t address);
  // The allocation, of any device, whose bounds are nearest, for a message; null when there is
  // none.
  Allocation* nearest(uint64_t address);
  void* allocate(size_t bytes, int device);
  bool release(void* pointer);

 private:
  std::map<uint64_t, Allocation> ranges_;  // by begin
  int next_label_ = 0;
  int device_ = 0;
};

GlobalMemory& global_memory();

}  // namespace ptx
