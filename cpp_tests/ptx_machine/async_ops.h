// What the asynchronous operations of a block have done so far, as far as order is concerned.
//
// A Completion is a moment that threads wait for: a phase of an mbarrier, a group of wgmmas, a bulk
// store. A thread is ordered after it when it waited itself, or knows a thread that did.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "clocks.h"

namespace ptx {

struct Completion {
  int thread = 0;  // who started it, and where
  uint32_t pc = 0;
  bool complete = false;
  std::vector<uint32_t>
      seen;                   // [threads], the stamp of the epoch in which it waited; 0: it has not
  std::vector<bool> ordered;  // [threads], found to be ordered after it
};

// A bulk copy into shared memory.
struct AsyncWrite {
  int thread = 0;
  uint32_t pc = 0;
  bool landed = false;
  uint32_t phase = 0;  // the completion of the mbarrier's phase in which it landed
};

class AsyncOps {
 public:
  void start(int threads) {
    threads_ = threads;
    completions_.assign(1, {});
    writes_.assign(1, {});
  }
  // Numbers count from 1.
  uint32_t add_completion(int thread, uint32_t pc) {
    completions_.push_back({thread, pc, false, {}, {}});
    return static_cast<uint32_t>(completions_.size()) - 1;
  }
  uint32_t add_write(int thread, uint32_t pc) {
    writes_.push_back({thread, pc, false, 0});
    return static_cast<uint32_t>(writes_.size()) - 1;
  }
  Completion& completion(uint32_t id) { return completions_[id]; }
  bool is_complete(uint32_t id) const { return completions_[id].complete; }
  AsyncWrite& write(uint32_t id) { return writes_[id]; }

  // The thread waited for it.
  void see(uint32_t id, const Clocks& clocks, int thread) {
    Completion& c = completions_[id];
    if (c.seen.empty()) {
      c.seen.assign(threads_, 0);
      c.ordered.assign(threads_, false);
    }
    c.complete = true;
    if (c.seen[thread] == 0) c.seen[thread] = clocks.own(thread);
    c.ordered[thread] = true;
  }
  bool is_ordered(uint32_t id, const Clocks& clocks, int thread) {
    Completion& c = completions_[id];
    if (c.seen.empty()) return false;
    if (c.ordered[thread]) return true;
    for (int other = 0; other < threads_; ++other) {
      if (c.seen[other] == 0 || !clocks.knows(thread, other, c.seen[other])) continue;
      c.ordered[thread] = true;
      return true;
    }
    return false;
  }

 private:
  int threads_ = 0;
  std::deque<Completion> completions_;
  std::deque<AsyncWrite> writes_;
};

}  // namespace ptx
