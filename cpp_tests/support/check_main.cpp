// main() of every executable of TESTs.
#include "check.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--list") return check::list();
  return check::run_all(argc, argv);
}
