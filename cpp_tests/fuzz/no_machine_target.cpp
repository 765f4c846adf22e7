// A build without CUDA has no kernels to run.
#include "target.h"

namespace flashtile::test {

FuzzTarget machine_target(const std::string&) {
  FuzzTarget target;
  target.unavailable = "this build has no CUDA";
  return target;
}

}  // namespace flashtile::test
