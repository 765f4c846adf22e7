// The CPU op with the instruction set that it chooses, or FLASHTILE_CPU_ISA.
#include "target.h"

namespace flashtile::test {

FuzzTarget cpu_target() {
  FuzzTarget target;
  target.range.dtypes = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};
  target.range.work = 12'000'000;
  target.attempt = [](const Setup& setup, const Truth& truth, uint64_t) {
    return attempt_on_cpu(setup, truth);
  };
  return target;
}

}  // namespace flashtile::test
