// Lines of standard input, read by a thread of its own so that requests arrive while a step runs.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace engine {

class LineReader {
 public:
  LineReader();
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
  void add(const std::string& text);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> lines_;
  bool ended_ = false;
  std::thread thread_;
};

}  // namespace engine
