// Bulk copies between global and shared memory: TMA boxes and plain ranges, in flight until an
// mbarrier's phase or a bulk group says that they are done. They land at random moments in between.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "tensor_map.h"

namespace ptx {

struct Block;
struct Warp;
struct Allocation;

struct BulkCopy {
  bool tensor = false;  // a box of `map` at `at`, otherwise `bytes` at `global`
  bool adds = false;    // a reduction instead of a store
  Element element = Element::kInteger;
  TensorMap map;
  int32_t at[kMaxRank] = {};
  uint64_t global = 0;
  uint32_t offset = 0;  // in shared memory
  uint32_t bytes = 0;   // of shared memory
  int thread = 0;
  uint32_t pc = 0;
  uint32_t barrier = 0;  // of a load: the offset of its mbarrier
  uint32_t write = 0;    // of a load: its AsyncWrite
  uint32_t read = 0;     // of a store: the completion of its reading
  uint32_t group = 0;    // of a store: its bulk group in its thread
  bool was_read = false;
  bool landed = false;
  std::vector<char> data;  // what a store has read, in order of its box
};

// The copies of one block.
class BulkEngine {
 public:
  void start(Block* block, int threads);

  void add_load(BulkCopy copy);
  void add_store(BulkCopy copy);
  void commit(int thread) { ++threads_[thread].committed; }
  // Until at most `allowed` groups of the thread are unfinished; only_read: until they were read.
  void wait(int thread, uint32_t allowed, bool only_read);

  // One step of a random copy; false when nothing is in flight.
  bool step();
  bool idle() const { return loads_.empty() && waiting_stores_ == 0; }
  // A store that its thread has not waited for, at the end of the block; null: none.
  const BulkCopy* unread_store() const;

  uint32_t next_group(int thread) const { return threads_[thread].committed; }

 private:
  struct Thread {
    std::deque<BulkCopy> stores;
    uint32_t committed = 0;
  };
  void land_load(const BulkCopy& copy);
  void read_store(BulkCopy& copy);
  void land_store(BulkCopy& copy);

  Block* block_ = nullptr;
  std::vector<BulkCopy> loads_;
  std::vector<Thread> threads_;
  std::vector<int> storing_;  // threads with stores that have not landed
  size_t waiting_stores_ = 0;
};

}  // namespace ptx
