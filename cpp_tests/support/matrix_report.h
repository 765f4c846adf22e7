// What became of the cells of matrix.h. Printed when a test ends; with
// FLASHTILE_MATRIX_REPORT=<directory> also written there, for matrix_report.py to count all of
// them.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "matrix.h"

namespace flashtile::test {

enum class Outcome { kPassed, kRefused, kFailed };

class MatrixReport {
 public:
  explicit MatrixReport(std::string device) : device_(std::move(device)) {}

  // `sentence`: with which the cell is refused.
  void add(const Cell& cell, const char* pass, Outcome outcome, const std::string& sentence = "") {
    lines_.push_back(device_ + "\t" + pass + "\t" + std::to_string(cell.index) + "\t" +
                     kNames[static_cast<int>(outcome)] + "\t" + sentence);
    ++counts_[static_cast<int>(outcome)];
  }

  void print() const {
    std::printf("%s: %d cells passed, %d refused with the reason, %d failed\n", device_.c_str(),
                counts_[0], counts_[1], counts_[2]);
    const char* directory = std::getenv("FLASHTILE_MATRIX_REPORT");
    if (directory == nullptr) return;
    const std::string path = std::string(directory) + "/" + std::to_string(getpid()) + ".tsv";
    std::FILE* file = std::fopen(path.c_str(), "a");
    if (file == nullptr) return;  // the directory is made by matrix/clear
    for (const std::string& line : lines_) std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
  }

 private:
  static constexpr const char* kNames[] = {"passed", "refused", "failed"};
  std::string device_;
  std::vector<std::string> lines_;
  int counts_[3] = {};
};

}  // namespace flashtile::test
