// Decides what every step of the model computes: continuous batching over a paged cache.
//
// A step takes tokens of many sequences: one of each that is decoding, as many as fit of the prompt
// that is in the making, and new requests as long as there is room. When pages run out,
// the sequence that came last gives its own back and waits; it computes its tokens again later. So
// the oldest always moves on, and every request that is admitted ends.
//
// Sequences with equal beginnings share pages: a request takes over the pages of a running one as
// far as their tokens are equal, and whoever writes into a page that has other holders writes into
// a copy.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "page_pool.h"
#include "sequence.h"

namespace engine {

struct Limits {
  int64_t page_size = 16;
  int64_t max_seqlen = 2048;      // tokens of a sequence, prompt and answer
  int64_t max_sequences = 32;     // that run at once
  int64_t max_step_tokens = 256;  // that a step computes; at least max_sequences
};

// Page `from` to be copied onto page `to`, all layers, before the step writes anything; in order.
struct PageCopy {
  int32_t from;
  int32_t to;
};

// Tokens [computed, computed + count) of a sequence, whose pages have room for them.
struct Slice {
  Sequence* sequence;
  int64_t count;
  // The last one is the last of the sequence: its logits say how it goes on.
  bool samples() const { return count == sequence->pending(); }
};

struct Step {
  std::vector<PageCopy> copies;
  std::vector<Slice> slices;
};

class Scheduler {
 public:
  Scheduler(const Limits& limits, int32_t num_pages);

  // Why this request can never run: a sentence; none where it can.
  std::optional<std::string> refuse(const Request& request) const;
  void add(Request request);

  // The next step; without slices when there is nothing to do. Sequences stay where they are in
  // memory until they are removed.
  Step plan();
  // Ends a sequence, waiting or running, and gives its pages back; its last state, or none.
  std::unique_ptr<Sequence> remove(const std::string& id);

  const PagePool& pages() const { return pool_; }
  const Limits& limits() const { return limits_; }
  int64_t running() const { return static_cast<int64_t>(running_.size()); }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t preemptions() const { return preemptions_; }
  bool has(const std::string& id) const;

 private:
  // A running sequence, and how many of its rows another one can use.
  struct Donor {
    const Sequence* sequence = nullptr;
    int64_t rows = 0;
  };

  int64_t blocks(int64_t rows) const;
  bool grow(Sequence& sequence, int64_t count, std::vector<PageCopy>& copies);
  void preempt_last();
  void admit(int64_t budget, Step& step);
  Donor find_donor(const Sequence& sequence) const;
  void take_over(Sequence& sequence, const Donor& donor);
  void release_pages(Sequence& sequence);

  Limits limits_;
  PagePool pool_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in the order in which they came
  std::deque<std::unique_ptr<Sequence>> waiting_;
  int64_t preemptions_ = 0;
};

}  // namespace engine
