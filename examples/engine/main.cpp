// A serving engine on flashtile: requests as JSON lines on standard input, tokens as JSON lines on
// standard output (protocol.h), progress on standard error.
//
//   flashtile_engine --model FOLDER [--pages N] [--device cpu] [--dtype float32] ...
#include <getopt.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "line_reader.h"

namespace engine {
namespace {

constexpr const char* kUsage =
    "usage: flashtile_engine --model FOLDER\n"
    "  --device auto|cpu|cuda                    --dtype auto|float32|bfloat16|float16\n"
    "  --pages N            of the cache         --page-size N        rows of a page\n"
    "  --max-seqlen N       prompt and answer    --max-sequences N    that run at once\n"
    "  --max-step-tokens N  that a step computes\n";

struct Options {
  bool help = false;
  ModelOptions model;
  Limits limits;
};

int64_t whole_number(const std::string& name, const std::string& text) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || value < 1 || value > INT32_MAX) {
    throw std::invalid_argument("--" + name + " is " + text + "; allowed: 1 to 2147483647");
  }
  return value;
}

Options parse_options(int argc, char** argv) {
  Options options;
  const std::map<std::string, std::string*> texts = {{"device", &options.model.device},
                                                     {"dtype", &options.model.dtype}};
  const std::map<std::string, int64_t*> numbers = {
      {"pages", &options.model.num_pages},
      {"page-size", &options.model.page_size},
      {"max-seqlen", &options.limits.max_seqlen},
      {"max-sequences", &options.limits.max_sequences},
      {"max-step-tokens", &options.limits.max_step_tokens}};
  std::vector<option> known = {{"help", no_argument, nullptr, 0},
                               {"model", required_argument, nullptr, 0}};
  for (const auto& [name, value] : texts) {
    known.push_back({name.c_str(), required_argument, nullptr, 0});
  }
  for (const auto& [name, value] : numbers) {
    known.push_back({name.c_str(), required_argument, nullptr, 0});
  }
  known.push_back({});
  int index = 0;
  opterr = 0;  // one sentence is enough
  for (int found; (found = getopt_long(argc, argv, ":", known.data(), &index)) != -1;) {
    const std::string given = argv[optind - 1];
    if (found == ':') throw std::invalid_argument(given + " lacks its value");
    if (found != 0) throw std::invalid_argument("there is no option " + given + "; try --help");
    const std::string name = known[index].name;
    if (name == "help") {
      options.help = true;
    } else if (name == "model") {
      options.model.folder = optarg;
    } else if (const auto text = texts.find(name); text != texts.end()) {
      *text->second = optarg;
    } else {
      *numbers.at(name) = whole_number(name, optarg);
    }
  }
  if (optind != argc) {
    throw std::invalid_argument(std::string("there is no option ") + argv[optind] + "; try --help");
  }
  if (options.model.folder.empty() && !options.help) {
    throw std::invalid_argument("--model is missing; allowed: a folder of export_model.py");
  }
  options.limits.page_size = options.model.page_size;
  return options;
}

// One line on standard error, at most once a second.
class Progress {
 public:
  void show(const Stats& stats, bool always) {
    const Clock::time_point now = Clock::now();
    if (!always && now - shown_ < std::chrono::seconds(1)) return;
    shown_ = now;
    std::fprintf(stderr,
                 "engine: %lld running, %lld waiting, %lld of %lld pages in use, %lld tokens, "
                 "%.1f tokens/s\n",
                 static_cast<long long>(stats.running), static_cast<long long>(stats.waiting),
                 static_cast<long long>(stats.pages_in_use), static_cast<long long>(stats.pages),
                 static_cast<long long>(stats.generated_tokens),
                 stats.busy_seconds > 0
                     ? static_cast<double>(stats.generated_tokens) / stats.busy_seconds
                     : 0.0);
  }

 private:
  Clock::time_point shown_ = Clock::now();
};

void emit(const std::string& line) { std::cout << line << '\n' << std::flush; }

void serve(Options options) {
  Model model(options.model);
  const ModelConfig& config = model.config();
  // Beyond it there are no rows in the rotary tables.
  options.limits.max_seqlen = std::min(options.limits.max_seqlen, config.max_seqlen);
  Engine engine(model, options.limits, static_cast<int32_t>(options.model.num_pages), emit);
  emit(ready_line({.device = model.device(),
                   .dtype = model.dtype(),
                   .max_seqlen = options.limits.max_seqlen,
                   .vocab_size = config.vocab_size,
                   .pages = options.model.num_pages,
                   .page_size = options.model.page_size,
                   .cache_bytes = model.cache_bytes()}));
  LineReader reader(kLongestLine);
  Progress progress;
  bool busy = false;
  while (busy || !reader.ended()) {
    for (const std::string& line : reader.take(/*wait=*/!busy)) engine.receive(line);
    const bool was_busy = std::exchange(busy, engine.step());
    if (busy || was_busy) progress.show(engine.stats(), /*always=*/!busy);
  }
  emit(stats_line(engine.stats()));
}

}  // namespace
}  // namespace engine

int main(int argc, char** argv) {
  try {
    const engine::Options options = engine::parse_options(argc, argv);
    if (options.help) {
      std::cout << engine::kUsage;
    } else {
      engine::serve(options);
    }
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    // torch appends where it was thrown, line by line.
    const std::string text = error.what();
    std::fprintf(stderr, "%s\n", text.substr(0, text.find('\n')).c_str());
    return EXIT_FAILURE;
  }
}
