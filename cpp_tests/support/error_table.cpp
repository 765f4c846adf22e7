#include "error_table.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace flashtile::test {

void ErrorTable::add(const std::string& backend, const Setup& setup, const Verdict& verdict) {
  const int dims = class_of(std::max(setup.head_dim, setup.head_dim_v));
  note(backend, setup.dtype, dims, "out", verdict.forward);
  note(backend, setup.dtype, dims, "lse", verdict.lse);
  if (setup.forward_only()) return;
  note(backend, setup.dtype, dims, "dq, dk, dv", verdict.backward);
  if (setup.spec.scores.exist()) note(backend, setup.dtype, dims, "of scores", verdict.scores);
}

void ErrorTable::print() const {
  std::printf("%-18s %-6s %7s  %-12s %7s  %12s  %s\n", "backend", "dtype", "dims to", "result",
              "runs", "ratio", "error");
  for (const auto& [key, row] : rows_) {
    const auto& [backend, dtype, dim, pass] = key;
    std::printf("%-18s %-6s %7d  %-12s %7d  %12.3f  %.2e\n", backend.c_str(), dtype.c_str(), dim,
                pass.c_str(), row.runs, row.ratio, row.error);
  }
  write();
}

int ErrorTable::class_of(int head_dim) {
  for (const int largest : {32, 64, 96, 128, 192, 256}) {
    if (head_dim <= largest) return largest;
  }
  return 512;
}

void ErrorTable::note(const std::string& backend, Dtype dtype, int dim, const char* pass,
                      const Comparison& comparison) {
  Row& row = rows_[{backend, name_of(dtype), dim, pass}];
  ++row.runs;
  row.ratio = std::max(row.ratio, comparison.ratio);
  row.error = std::max(row.error, comparison.error);
}

void ErrorTable::write() const {
  const char* directory = std::getenv("FLASHTILE_ERROR_TABLE");
  if (directory == nullptr || rows_.empty()) return;
  const std::string path = std::string(directory) + "/" + std::to_string(getpid()) + ".tsv";
  std::FILE* file = std::fopen(path.c_str(), "a");
  if (file == nullptr) return;  // the directory is made by error_table/clear
  for (const auto& [key, row] : rows_) {
    const auto& [backend, dtype, dim, pass] = key;
    std::fprintf(file, "%s\t%s\t%d\t%s\t%d\t%g\t%g\n", backend.c_str(), dtype.c_str(), dim,
                 pass.c_str(), row.runs, row.ratio, row.error);
  }
  std::fclose(file);
}

}  // namespace flashtile::test
