#include "global_shadow.h"

#include <cstdio>

namespace ptx {

namespace {

// One word of one access.
struct Word {
  const GlobalAccess& at;
  Allocation& range;
  Block& block;
  uint64_t address = 0;
  int thread = at.warp.first_thread() + at.lane;
  uint32_t agent = agent_of(block.number, thread);
  uint32_t stamp = block.clocks.own(thread);

  bool is_async() const { return (at.how & kAsync) != 0; }
  bool is_here(uint32_t other) const { return block_of(other) == block.number; }
  bool comes_after(uint32_t other, uint32_t stamp_of_other) const {
    return is_here(other) ? block.clocks.knows(thread, thread_of(other), stamp_of_other)
                          : block.clocks.knows_foreign(thread, block_of(other), thread_of(other),
                                                       stamp_of_other);
  }
};

struct Earlier {
  const char* what;
  uint32_t agent;
  uint32_t pc;
};

[[noreturn]] void fail(const Word& word, Error kind, const char* relation, const Earlier& earlier) {
  char message[512];
  std::snprintf(
      message, sizeof message, "%s of global memory (%s + %llu) %s the %s by thread %d of %s at %s",
      verb(word.at.access), word.range.label.c_str(),
      static_cast<unsigned long long>(word.address - word.range.begin), relation, earlier.what,
      thread_of(earlier.agent), word.is_here(earlier.agent) ? "this block" : "another block",
      word.block.where(earlier.pc).c_str());
  word.block.fail(kind, word.at.warp, word.at.pc, word.at.lane, message);
}

// Whether two accesses may meet without order: both strong, through one proxy, and each within the
// other's scope.
bool may_meet(const Word& word, uint8_t how, uint32_t agent) {
  const uint8_t mine = word.at.how;
  if ((mine & how & kStrong) == 0 || ((mine ^ how) & kAsync) != 0) return false;
  return word.is_here(agent) || ((mine | how) & kBlockScope) == 0;
}

// The last write of the word is visible to this access, or it is an error.
void check_last_write(const Word& word, const WordShadow& w) {
  const bool free = may_meet(word, w.write_how, w.write_agent);
  const bool is_sum = word.block.ordered_sums && (word.at.how & w.write_how & kSum) != 0;
  if (free && !is_sum) return;
  const char* const what = (w.write_how & kStrong) != 0 ? "atomic update" : "write";
  const Earlier last{what, w.write_agent, w.write_pc};
  if ((w.write_how & kInFlight) != 0) {
    fail(word, free ? Error::kUnorderedSum : Error::kInFlight, "is not ordered after",
         {"bulk copy, which is in flight,", last.agent, last.pc});
  }
  if (!word.comes_after(w.write_agent, w.write_stamp))
    fail(word, free ? Error::kUnorderedSum : Error::kRace, "is not ordered after", last);
  const bool here = word.is_here(w.write_agent);
  if (!word.is_async() || (here && (w.write_how & kAsync) != 0)) return;
  const Clocks& clocks = word.block.clocks;
  const int other = thread_of(w.write_agent);
  const bool shown = here ? clocks.shows(kGlobalProxy, word.thread, other, w.write_stamp)
                          : clocks.shows_foreign(kGlobalProxy, word.thread, block_of(w.write_agent),
                                                 other, w.write_stamp);
  if (!shown)
    fail(word, Error::kProxy, "by the async proxy, without a fence.proxy.async behind", last);
}

// A bulk load of this block has read the word: it is over, and the thread knows.
void check_bulk_load(const Word& word, const WordShadow& w) {
  AsyncOps& async = word.block.async;
  const AsyncWrite& load = async.write(w.read_load);
  const Earlier read{"read by the bulk load", w.read_agent, w.read_pc};
  if (!load.landed || !async.is_complete(load.phase))
    fail(word, Error::kInFlight, "is not ordered after", read);
  if (!async.is_ordered(load.phase, word.block.clocks, word.thread))
    fail(word, Error::kRace, "is not ordered after", read);
}

void check_last_reads(const Word& word, const WordShadow& w) {
  const uint32_t begin = word.block.launch_stamp;
  if (w.read_stamp < begin || may_meet(word, w.read_how, w.read_agent)) return;
  if ((w.read_how & kAsync) != 0 && word.is_here(w.read_agent)) {
    check_bulk_load(word, w);
  } else if (!word.comes_after(w.read_agent, w.read_stamp)) {
    fail(word, Error::kRace, "is not ordered after", {"read", w.read_agent, w.read_pc});
  }
  if (w.foreign_read_stamp >= begin &&
      !word.comes_after(w.foreign_read_agent, w.foreign_read_stamp))
    fail(word, Error::kRace, "is not ordered after",
         {"read", w.foreign_read_agent, w.foreign_read_pc});
}

void note_read(const Word& word, WordShadow& w) {
  const bool is_live = w.read_stamp >= word.block.launch_stamp;
  const bool is_strong = (w.read_how & kStrong) != 0;
  // An ordinary read conflicts with more than a strong one.
  if (is_live && !is_strong && (word.at.how & kStrong) != 0) return;
  if (is_live && !is_strong && !word.is_here(w.read_agent)) {
    w.foreign_read_stamp = w.read_stamp;
    w.foreign_read_agent = w.read_agent;
    w.foreign_read_pc = w.read_pc;
  }
  w.read_stamp = word.stamp;
  w.read_agent = word.agent;
  w.read_pc = word.at.pc;
  w.read_load = word.at.load;
  w.read_how = word.at.how;
}

// `covered`: which bytes of the word.
void check_word(const Word& word, WordShadow& w, uint8_t covered) {
  const bool is_live = w.write_stamp >= word.block.launch_stamp;
  if (is_live && (w.write_bytes & covered) != 0) check_last_write(word, w);
  if (word.at.access == Access::kRead) return note_read(word, w);
  if (covered == 0xF) check_last_reads(word, w);
  w.write_stamp = word.stamp;
  w.write_agent = word.agent;
  w.write_pc = word.at.pc;
  w.write_bytes = covered;
  w.write_how = static_cast<uint8_t>(word.at.how | (word.is_async() ? kInFlight : 0));
}

}  // namespace

void check_global(const GlobalAccess& at, Allocation& range) {
  const uint64_t end = at.address + at.bytes;
  Word word{at, range, *at.warp.block};
  for (word.address = at.address & ~uint64_t{3}; word.address < end; word.address += 4) {
    uint8_t covered = 0xF;
    if (word.address < at.address || word.address + 4 > end) {
      covered = 0;
      for (int b = 0; b < 4; ++b) {
        const uint64_t byte = word.address + static_cast<uint64_t>(b);
        covered |= static_cast<uint8_t>((byte >= at.address && byte < end) << b);
      }
    }
    check_word(word, *range.word(word.address), covered);
  }
}

void end_bulk_write(Block& block, int thread, uint64_t address, uint32_t bytes) {
  Allocation* range = global_memory().find(address);
  const uint32_t agent = agent_of(block.number, thread);
  for (uint64_t at = address & ~uint64_t{3}; at < address + bytes; at += 4) {
    WordShadow& w = *range->word(at);
    if (w.write_agent != agent || (w.write_how & kAsync) == 0) continue;
    w.write_how = static_cast<uint8_t>(w.write_how & ~kInFlight);
    w.write_stamp = block.clocks.own(thread);
  }
}

}  // namespace ptx
