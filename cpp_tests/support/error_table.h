// Largest error ratio per backend, dtype, class of head dims and pass. Printed when a test ends;
// with FLASHTILE_ERROR_TABLE=<directory> also written there, for error_table.py to merge. A class
// holds the head dims (the larger of head_dim and head_dim_v) that one slice of the kernels serves.
#pragma once

#include <map>
#include <string>
#include <tuple>

#include "compare.h"
#include "setup.h"

namespace flashtile::test {

class ErrorTable {
 public:
  void add(const std::string& backend, const Setup& setup, const Verdict& verdict);

  void print() const;

 private:
  struct Row {
    int runs = 0;
    double ratio = 0.0, error = 0.0;
  };

  static int class_of(int head_dim);

  void note(const std::string& backend, Dtype dtype, int dim, const char* pass,
            const Comparison& comparison);

  void write() const;

  std::map<std::tuple<std::string, std::string, int, std::string>, Row> rows_;
};

}  // namespace flashtile::test
