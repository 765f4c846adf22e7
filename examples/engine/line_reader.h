// Lines of standard input, read by a thread of its own so that requests arrive while a step runs.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace engine {

class LineReader {
 public:
  // Of a line with more than `longest` bytes, the first longest + 1 are kept: enough to refuse it.
  explicit LineReader(size_t longest);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // The lines that have come since the last call. With `wait`, blocks until there is one or the
  // input ends.
  std::vector<std::string> take(bool wait);
  // The input has ended, and every line has been taken.
  bool ended();

 private:
  void read();
  void extend(std::string& line, std::string_view more) const;
  void add(std::vector<std::string> lines);

  const size_t longest_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> lines_;
  bool ended_ = false;
  std::thread thread_;
};

}  // namespace engine
