// What became of the cells of matrix.h. Printed when a test ends; with
// FLASHTILE_MATRIX_REPORT=<directory> also written there, for matrix_report.py to count all of
// them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "matrix.h"

namespace flashtile::test {

enum class Outcome { kPassed, kRefused, kFailed };

class MatrixReport {
 public:
  explicit MatrixReport(std::string device) : device_(std::move(device)) {}

  // `sentence`: with which the cell is refused.
  void add(const Cell& cell, const char* pass, Outcome outcome, const std::string& sentence = "");

  void print() const;

 private:
  static constexpr const char* kNames[] = {"passed", "refused", "failed"};
  std::string device_;
  std::vector<std::string> lines_;
  int counts_[3] = {};
};

}  // namespace flashtile::test
