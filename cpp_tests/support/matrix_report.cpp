#include "matrix_report.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace flashtile::test {

void MatrixReport::add(const Cell& cell, const char* pass, Outcome outcome,
                       const std::string& sentence) {
  lines_.push_back(device_ + "\t" + pass + "\t" + std::to_string(cell.index) + "\t" +
                   kNames[static_cast<int>(outcome)] + "\t" + sentence);
  ++counts_[static_cast<int>(outcome)];
}

void MatrixReport::print() const {
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

}  // namespace flashtile::test
