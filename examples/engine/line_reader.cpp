#include "line_reader.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <sstream>
#include <utility>

namespace engine {

LineReader::LineReader() : thread_([this] { read(); }) {}

// Whoever leaves before the input ends lets the process take the thread with it: nothing can wake a
// read of standard input.
LineReader::~LineReader() {
  if (ended()) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

// What was written at once arrives at once: lines that came together are taken together.
void LineReader::read() {
  std::string rest;  // of a line whose end has not come
  std::array<char, 1 << 16> bytes;
  for (ssize_t count; (count = ::read(STDIN_FILENO, bytes.data(), bytes.size())) != 0;) {
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) break;
    rest.append(bytes.data(), static_cast<size_t>(count));
    const size_t end = rest.rfind('\n');
    if (end == std::string::npos) continue;
    add(rest.substr(0, end));
    rest.erase(0, end + 1);
  }
  add(rest);
  const std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_one();
}

void LineReader::add(const std::string& text) {
  std::istringstream lines(text);
  const std::lock_guard lock(mutex_);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) lines_.push_back(line);
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
