#include "line_reader.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <string_view>
#include <utility>

namespace engine {

LineReader::LineReader(size_t longest) : longest_(longest), thread_([this] { read(); }) {}

// Whoever leaves before the input ends lets the process take the thread with it: nothing can wake a
// read of standard input.
LineReader::~LineReader() {
  if (ended()) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void LineReader::extend(std::string& line, std::string_view more) const {
  line.append(more.substr(0, longest_ + 1 - line.size()));
}

// What was written at once arrives at once: lines that came together are taken together.
void LineReader::read() {
  std::string line;  // its end may not have come
  std::array<char, 1 << 16> bytes;
  for (ssize_t count; (count = ::read(STDIN_FILENO, bytes.data(), bytes.size())) != 0;) {
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) break;
    std::vector<std::string> lines;
    std::string_view rest(bytes.data(), static_cast<size_t>(count));
    for (size_t end; (end = rest.find('\n')) != std::string_view::npos;
         rest.remove_prefix(end + 1)) {
      extend(line, rest.substr(0, end));
      lines.push_back(std::exchange(line, {}));
    }
    extend(line, rest);
    add(std::move(lines));
  }
  add({line});
  const std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_one();
}

void LineReader::add(std::vector<std::string> lines) {
  const std::lock_guard lock(mutex_);
  for (std::string& line : lines) {
    if (!line.empty()) lines_.push_back(std::move(line));
  }
  changed_.notify_one();
}

std::vector<std::string> LineReader::take(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) changed_.wait(lock, [this] { return ended_ || !lines_.empty(); });
  return std::exchange(lines_, {});
}

bool LineReader::ended() {
  const std::lock_guard lock(mutex_);
  return ended_ && lines_.empty();
}

}  // namespace engine
