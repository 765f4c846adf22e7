#include "engine.h"

#include <algorithm>
#include <span>
#include <utility>

#include "sampler.h"

namespace engine {
namespace {

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Engine::Engine(Model& model, const Limits& limits, int32_t num_pages,
               std::function<void(const std::string&)> emit)
    : model_(model), scheduler_(limits, num_pages), emit_(std::move(emit)) {}

void Engine::receive(const std::string& line) {
  try {
    std::visit([this](auto message) { receive(std::move(message)); },
               parse_message(line, model_.config().vocab_size));
  } catch (const ProtocolError& error) {
    ++counted_.requests;
    ++counted_.refused;
    emit_(error_line(error.id, error.what()));
  }
}

void Engine::receive(Request request) {
  if (scheduler_.has(request.id)) {
    throw ProtocolError(request.id, "id " + request.id + " is still running; allowed: another one");
  }
  if (const auto reason = scheduler_.refuse(request)) throw ProtocolError(request.id, *reason);
  ++counted_.requests;
  scheduler_.add(std::move(request));
}

void Engine::receive(const Cancel& cancel) {
  const std::unique_ptr<Sequence> sequence = scheduler_.remove(cancel.id);
  if (!sequence) return;  // it had ended while the line was on its way
  ++counted_.cancelled;
  emit_(finished_line(*sequence, "cancelled"));
}

bool Engine::step() {
  const Clock::time_point start = Clock::now();
  const Step step = scheduler_.plan();
  if (step.slices.empty()) return false;
  for (const PageCopy& copy : step.copies) model_.copy_page(copy.from, copy.to);
  const Logits logits = model_.forward(make_batch(step));

  size_t row = 0;
  const auto vocab_size = static_cast<size_t>(logits.vocab_size);
  for (const Slice& slice : step.slices) {
    Sequence& sequence = *slice.sequence;
    const bool samples = slice.samples();
    sequence.computed += slice.count;
    counted_.computed_tokens += slice.count;
    if (!samples) continue;
    const std::span<const float> of_sequence(logits.values.data() + row++ * vocab_size, vocab_size);
    take_token(sequence, sample(of_sequence, sequence.request.sampling, sequence.random));
  }
  ++counted_.steps;
  counted_.copied_pages += static_cast<int64_t>(step.copies.size());
  counted_.busy_seconds += seconds_since(start);
  return true;
}

Batch Engine::make_batch(const Step& step) const {
  Batch batch;
  for (const Slice& slice : step.slices) {
    batch.max_blocks =
        std::max(batch.max_blocks, static_cast<int64_t>(slice.sequence->pages.size()));
  }
  for (const Slice& slice : step.slices) {
    const Sequence& sequence = *slice.sequence;
    const auto first = sequence.tokens.begin() + sequence.computed;
    batch.tokens.insert(batch.tokens.end(), first, first + slice.count);
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));
    batch.rows_before.push_back(static_cast<int32_t>(sequence.computed));
    std::vector<int32_t> pages = sequence.pages;
    pages.resize(batch.max_blocks, -1);  // no page: never read, as the sequence ends before
    batch.block_table.insert(batch.block_table.end(), pages.begin(), pages.end());
    if (slice.samples()) batch.logit_rows.push_back(batch.cu_seqlens.back() - 1);
  }
  return batch;
}

// A new token of a sequence; it may be the last one.
void Engine::take_token(Sequence& sequence, int32_t token) {
  const Request& request = sequence.request;
  sequence.tokens.push_back(token);
  ++counted_.generated_tokens;
  if (sequence.generated() == 1) {
    sequence.seconds_to_first_token = seconds_since(sequence.arrival);
    ++counted_.first_tokens;
    counted_.first_token_seconds_sum += sequence.seconds_to_first_token;
    counted_.first_token_seconds_max =
        std::max(counted_.first_token_seconds_max, sequence.seconds_to_first_token);
  }
  emit_(token_line(sequence));
  const bool stops = std::ranges::find(request.stop, token) != request.stop.end();
  if (!stops && sequence.generated() < request.max_tokens) return;
  ++counted_.finished;
  counted_.prompt_tokens += static_cast<int64_t>(request.prompt.size());
  counted_.shared_tokens += sequence.shared;
  emit_(finished_line(sequence, stops ? "stop" : "length"));
  scheduler_.remove(request.id);
}

Stats Engine::stats() const {
  Stats stats = counted_;
  stats.running = scheduler_.running();
  stats.waiting = scheduler_.waiting();
  stats.preemptions = scheduler_.preemptions();
  stats.pages = scheduler_.pages().size();
  stats.pages_in_use = scheduler_.pages().in_use();
  stats.pages_peak = scheduler_.pages().peak();
  return stats;
}

}  // namespace engine
