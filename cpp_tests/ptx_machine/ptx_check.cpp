// ptx_check FILE...: decodes every kernel of PTX files, or says which instruction is unknown.
// A file that ends in .txt is a list of PTX files.
#include <cstdio>
#include <string>

#include "machine.h"

int main(int argc, char** argv) {
  ptx::Machine& machine = ptx::machine();
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    if (path.ends_with(".txt"))
      machine.load_manifest(path);
    else
      machine.load_ptx(path);
  }
  const int kernels = machine.decode_all();
  std::fputs(machine.reports_text().c_str(), stdout);
  if (machine.reports().empty()) std::printf("%d kernels, every instruction is known\n", kernels);
  return machine.reports().empty() && kernels > 0 ? 0 : 1;
}
