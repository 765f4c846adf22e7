#include "scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace engine {

Scheduler::Scheduler(const Limits& limits, int32_t num_pages) : limits_(limits), pool_(num_pages) {
  if (limits.page_size < 1) throw std::invalid_argument("page_size is below 1");
  if (limits.max_sequences < 1) throw std::invalid_argument("max_sequences is below 1");
  if (limits.max_step_tokens < limits.max_sequences) {
    throw std::invalid_argument("max_step_tokens is " + std::to_string(limits.max_step_tokens) +
                                "; allowed: at least max_sequences, " +
                                std::to_string(limits.max_sequences));
  }
}

int64_t Scheduler::blocks(int64_t rows) const {
  return (rows + limits_.page_size - 1) / limits_.page_size;
}

std::optional<std::string> Scheduler::refuse(const Request& request) const {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const std::string tokens =
      std::to_string(prompt) + " tokens and max_tokens is " + std::to_string(request.max_tokens);
  if (prompt < 1) return "prompt is empty; allowed: 1 token and more";
  if (request.max_tokens < 1) return "max_tokens is below 1; allowed: 1 and more";
  if (request.max_tokens > limits_.max_seqlen - prompt) {
    return "prompt has " + tokens + "; allowed: " + std::to_string(limits_.max_seqlen) +
           " tokens together";
  }
  // The last token is never written: nothing comes after it.
  const int64_t needed = blocks(prompt + request.max_tokens - 1);
  if (needed > pool_.size()) {
    return "prompt has " + tokens + ", which takes " + std::to_string(needed) +
           " pages; allowed: " + std::to_string(pool_.size());
  }
  return std::nullopt;
}

void Scheduler::add(Request request) {
  waiting_.push_back(std::make_unique<Sequence>(std::move(request)));
}

bool Scheduler::has(const std::string& id) const {
  const auto named = [&](const auto& sequence) { return sequence->request.id == id; };
  return std::ranges::any_of(running_, named) || std::ranges::any_of(waiting_, named);
}

Step Scheduler::plan() {
  Step step;
  int64_t budget = limits_.max_step_tokens;
  const int64_t preemptions_before = preemptions_;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    // Only the last one can have more than one token left, as admit() stops where a prompt did not
    // fit into a step: a long prompt never holds up the others' decoding.
    const int64_t count = std::min(sequence.pending(), budget);
    // Whoever gives pages is behind and not in the step yet, or the sequence itself.
    while (i < running_.size() && !grow(sequence, count, step.copies)) preempt_last();
    if (i == running_.size()) break;
    step.slices.push_back({&sequence, count});
    budget -= count;
  }
  if (preemptions_ == preemptions_before) admit(budget, step);
  return step;
}

std::unique_ptr<Sequence> Scheduler::remove(const std::string& id) {
  const auto take_from = [&](auto& sequences) -> std::unique_ptr<Sequence> {
    const auto at = std::ranges::find_if(
        sequences, [&](const auto& sequence) { return sequence->request.id == id; });
    if (at == sequences.end()) return nullptr;
    std::unique_ptr<Sequence> sequence = std::move(*at);
    sequences.erase(at);
    release_pages(*sequence);
    return sequence;
  };
  std::unique_ptr<Sequence> sequence = take_from(running_);
  return sequence ? std::move(sequence) : take_from(waiting_);
}

// Makes the next `count` rows of a sequence writable: pages that it holds alone. All or nothing.
bool Scheduler::grow(Sequence& sequence, int64_t count, std::vector<PageCopy>& copies) {
  const int64_t held = static_cast<int64_t>(sequence.pages.size());
  const int64_t first = sequence.computed / limits_.page_size;  // the block written first
  const bool shared = first < held && pool_.holders(sequence.pages[first]) > 1;
  const int64_t wanted = blocks(sequence.computed + count) - held;
  if (std::max<int64_t>(wanted, 0) + (shared ? 1 : 0) > pool_.free()) return false;
  if (shared) {
    const int32_t page = *pool_.allocate();
    copies.push_back({sequence.pages[first], page});
    pool_.release(std::exchange(sequence.pages[first], page));
  }
  for (int64_t i = 0; i < wanted; ++i) sequence.pages.push_back(*pool_.allocate());
  return true;
}

void Scheduler::preempt_last() {
  std::unique_ptr<Sequence> sequence = std::move(running_.back());
  running_.pop_back();
  release_pages(*sequence);
  ++sequence->preemptions;
  ++preemptions_;
  waiting_.push_front(std::move(sequence));
}

void Scheduler::admit(int64_t budget, Step& step) {
  while (budget > 0 && !waiting_.empty() && running() < limits_.max_sequences) {
    Sequence& sequence = *waiting_.front();
    const Donor donor = find_donor(sequence);
    // Room for all its tokens, and for one more page of everybody else: what is admitted now should
    // not be thrown out by the next step.
    const int64_t needed = blocks(sequence.length()) - donor.rows / limits_.page_size;
    if (needed + running() > pool_.free()) return;
    take_over(sequence, donor);
    const int64_t count = std::min(sequence.pending(), budget);
    if (!grow(sequence, count, step.copies)) throw std::logic_error("admitted without pages");
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
    step.slices.push_back({&sequence, count});
    budget -= count;
  }
}

// Only rows that are in the cache already count, and never all of a sequence: its last token has to
// be computed for its logits. Below a page nothing is saved.
Scheduler::Donor Scheduler::find_donor(const Sequence& sequence) const {
  Donor best;
  for (const auto& other : running_) {
    const int64_t most = std::min(other->computed, sequence.length() - 1);
    const auto begin = sequence.tokens.begin();
    const int64_t equal = std::mismatch(begin, begin + most, other->tokens.begin()).first - begin;
    if (equal >= limits_.page_size && equal > best.rows) best = {other.get(), equal};
  }
  return best;
}

void Scheduler::take_over(Sequence& sequence, const Donor& donor) {
  for (int64_t block = 0; block < blocks(donor.rows); ++block) {
    const int32_t page = donor.sequence->pages[block];
    pool_.share(page);
    sequence.pages.push_back(page);
  }
  sequence.computed = donor.rows;
  sequence.shared += donor.rows;
}

void Scheduler::release_pages(Sequence& sequence) {
  for (const int32_t page : sequence.pages) pool_.release(page);
  sequence.pages.clear();
  sequence.computed = 0;
}

}  // namespace engine
