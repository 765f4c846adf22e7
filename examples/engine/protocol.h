// The engine's language: JSON objects, one a line.
//
//   in   {"id": "a", "prompt": [1, 2, 3], "max_tokens": 16, "temperature": 0.7, "top_p": 0.9,
//         "seed": 1, "stop": [2]}     a request; all but id and prompt may be left out
//        {"cancel": "a"}
//        {"stats": true}
//
//        A line has at most kLongestLine bytes, an id kLongestId.
//
//   out  {"ready": {...}}             once, when the model is loaded
//        {"id": "a", "token": 17, "index": 0}
//        {"id": "a", "finished": "stop" | "length" | "cancelled", "usage": {...}}
//        {"id": "a", "error": "a sentence"}          id is null when the line had none
//        {"stats": {...}}             when asked, and at the end
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "sequence.h"

namespace engine {

constexpr size_t kLongestLine = size_t{1} << 24;
constexpr size_t kLongestId = 256;

struct Cancel {
  std::string id;
};
struct AskStats {};
using Message = std::variant<Request, Cancel, AskStats>;

// What a line is refused with.
struct ProtocolError : std::runtime_error {
  ProtocolError(std::optional<std::string> from, const std::string& what)
      : std::runtime_error(what), id(std::move(from)) {}
  std::optional<std::string> id;
};

// Throws ProtocolError. Tokens must be below vocab_size. A sentence quotes a part of a long value,
// so that every line that goes out is short.
Message parse_message(const std::string& line, int64_t vocab_size);

// All since the start.
struct Stats {
  int64_t requests = 0;  // that came; of them
  int64_t finished = 0;
  int64_t refused = 0;
  int64_t cancelled = 0;
  int64_t running = 0;
  int64_t waiting = 0;
  int64_t steps = 0;
  int64_t prompt_tokens = 0;     // of finished requests
  int64_t generated_tokens = 0;  // of all
  int64_t computed_tokens = 0;   // that went through the model, again after a preemption
  int64_t shared_tokens = 0;     // that did not have to, because another request had them
  int64_t preemptions = 0;
  int64_t copied_pages = 0;
  int64_t pages = 0, pages_in_use = 0, pages_peak = 0;
  double busy_seconds = 0;  // in steps
  double first_token_seconds_sum = 0, first_token_seconds_max = 0;
  int64_t first_tokens = 0;
};

struct Ready {
  std::string device;
  std::string dtype;
  int64_t max_seqlen = 0;
  int64_t vocab_size = 0;
  int64_t pages = 0;
  int64_t page_size = 0;
  int64_t cache_bytes = 0;
};

// Lines, without the newline.
std::string ready_line(const Ready& ready);
std::string token_line(const Sequence& sequence);  // its last token
std::string finished_line(const Sequence& sequence, const std::string& reason);
std::string error_line(const std::optional<std::string>& id, const std::string& what);
std::string stats_line(const Stats& stats);

}  // namespace engine
