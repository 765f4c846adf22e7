#include "protocol.h"

#include <sys/resource.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

namespace engine {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMostTokens = 1 << 30;
constexpr size_t kLongestQuote = 100;  // bytes of a value that a sentence shows
constexpr int kDeepest = 3;            // values are copied and printed recursively: depth is stack

[[noreturn]] void fail(const std::optional<std::string>& id, const std::string& what) {
  throw ProtocolError(id, what);
}

// A text as a sentence shows it: long ones are cut, between two characters.
std::string quote(const std::string& text) {
  if (text.size() <= kLongestQuote) return text;
  size_t end = kLongestQuote;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::string show(const Json& value) { return quote(value.dump()); }

// A whole number without a fraction: 1, not 1.0.
std::string show(double value) {
  const bool whole = std::abs(value) <= 0x1p53 && std::trunc(value) == value;
  return whole ? std::to_string(static_cast<int64_t>(value)) : Json(value).dump();
}

// The values of one request, each checked and named.
class RequestParser {
 public:
  RequestParser(const Json& json, std::string id, int64_t vocab_size)
      : json_(json), id_(std::move(id)), vocab_size_(vocab_size) {}

  Request parse() const {
    static const std::set<std::string> known = {"id",    "prompt", "max_tokens", "temperature",
                                                "top_p", "seed",   "stop"};
    for (const auto& [name, value] : json_.items()) {
      if (!known.contains(name)) fail(id_, "there is no field " + quote(name));
    }
    if (!json_.contains("prompt")) fail(id_, "prompt is missing; allowed: a list of tokens");
    Request request;
    request.id = id_;
    request.prompt = tokens("prompt");
    request.stop = tokens("stop");
    request.max_tokens = static_cast<int64_t>(whole_number("max_tokens", 16, 1, kMostTokens));
    request.sampling.temperature = static_cast<float>(number("temperature", 0, 0, 100));
    request.sampling.top_p = static_cast<float>(number("top_p", 1, 0, 1));
    request.sampling.seed = static_cast<uint64_t>(whole_number("seed", 0, 0, 0x1p53));
    return request;
  }

 private:
  std::vector<int32_t> tokens(const char* name) const {
    const Json list = json_.value(name, Json::array());
    if (!list.is_array()) fail(id_, std::string(name) + " is no list; allowed: a list of tokens");
    std::vector<int32_t> result;
    for (const Json& token : list) {
      if (!token.is_number_integer() || token < 0 || token >= vocab_size_) {
        fail(id_, std::string(name) + " has " + show(token) + "; allowed: tokens, 0 to " +
                      std::to_string(vocab_size_ - 1));
      }
      result.push_back(token.get<int32_t>());
    }
    return result;
  }

  double number(const char* name, double otherwise, double least, double most) const {
    const Json value = json_.value(name, Json(otherwise));
    if (!value.is_number() || !(value.get<double>() >= least && value.get<double>() <= most)) {
      fail(id_, std::string(name) + " is " + show(value) + "; allowed: " + show(least) + " to " +
                    show(most));
    }
    return value.get<double>();
  }

  double whole_number(const char* name, double otherwise, double least, double most) const {
    const double value = number(name, otherwise, least, most);
    if (std::trunc(value) != value) {
      fail(id_, std::string(name) + " is " + show(value) + "; allowed: whole numbers, " +
                    show(least) + " to " + show(most));
    }
    return value;
  }

  const Json& json_;
  std::string id_;
  int64_t vocab_size_;
};

int64_t peak_memory_bytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * int64_t{1024};
}

double rounded(double value) { return std::round(value * 1e4) / 1e4; }

}  // namespace

Message parse_message(const std::string& line, int64_t vocab_size) {
  if (line.size() > kLongestLine) {
    fail(std::nullopt, "the line is too long; allowed: " + std::to_string(kLongestLine) + " bytes");
  }
  const auto check_depth = [](int depth, Json::parse_event_t, const Json&) {
    if (depth > kDeepest)
      fail(std::nullopt, "the line is nested too deep; allowed: lists of tokens");
    return true;
  };
  const Json json = Json::parse(line, check_depth, /*allow_exceptions=*/false);
  if (!json.is_object()) fail(std::nullopt, "the line is no JSON object");
  if (json.contains("stats")) return AskStats{};
  const bool cancels = json.contains("cancel");
  const Json id = json.value(cancels ? "cancel" : "id", Json());
  if (!id.is_string() || id.get_ref<const std::string&>().size() > kLongestId) {
    fail(std::nullopt, std::string(cancels ? "cancel" : "id") + " is " + show(id) +
                           "; allowed: a string of at most " + std::to_string(kLongestId) +
                           " bytes");
  }
  if (cancels) return Cancel{id};
  return RequestParser(json, id, vocab_size).parse();
}

std::string ready_line(const Ready& ready) {
  return Json{{"ready",
               {{"device", ready.device},
                {"dtype", ready.dtype},
                {"max_seqlen", ready.max_seqlen},
                {"vocab_size", ready.vocab_size},
                {"pages", ready.pages},
                {"page_size", ready.page_size},
                {"cache_bytes", ready.cache_bytes}}}}
      .dump();
}

std::string token_line(const Sequence& sequence) {
  return Json{{"id", sequence.request.id},
              {"token", sequence.tokens.back()},
              {"index", sequence.generated() - 1}}
      .dump();
}

std::string finished_line(const Sequence& sequence, const std::string& reason) {
  return Json{{"id", sequence.request.id},
              {"finished", reason},
              {"usage",
               {{"prompt_tokens", sequence.request.prompt.size()},
                {"completion_tokens", sequence.generated()},
                {"shared_tokens", sequence.shared},
                {"preemptions", sequence.preemptions},
                {"seconds_to_first_token", rounded(sequence.seconds_to_first_token)}}}}
      .dump();
}

std::string error_line(const std::optional<std::string>& id, const std::string& what) {
  const Json line = {{"id", id ? Json(*id) : Json()}, {"error", what}};
  // What is quoted may come from a line that was no UTF-8.
  return line.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string stats_line(const Stats& stats) {
  const double seconds = stats.busy_seconds;
  const auto per = [](double sum, double count) { return count > 0 ? sum / count : 0; };
  return Json{
      {"stats",
       {{"requests", stats.requests},
        {"finished", stats.finished},
        {"refused", stats.refused},
        {"cancelled", stats.cancelled},
        {"running", stats.running},
        {"waiting", stats.waiting},
        {"steps", stats.steps},
        {"prompt_tokens", stats.prompt_tokens},
        {"generated_tokens", stats.generated_tokens},
        {"computed_tokens", stats.computed_tokens},
        {"shared_tokens", stats.shared_tokens},
        {"preemptions", stats.preemptions},
        {"copied_pages", stats.copied_pages},
        {"pages", stats.pages},
        {"pages_in_use", stats.pages_in_use},
        {"pages_peak", stats.pages_peak},
        {"busy_seconds", rounded(seconds)},
        {"tokens_per_second", rounded(per(static_cast<double>(stats.generated_tokens), seconds))},
        {"first_token_seconds_mean",
         rounded(per(stats.first_token_seconds_sum, static_cast<double>(stats.first_tokens)))},
        {"first_token_seconds_max", rounded(stats.first_token_seconds_max)},
        {"peak_memory_bytes", peak_memory_bytes()}}}}
      .dump();
}

}  // namespace engine
