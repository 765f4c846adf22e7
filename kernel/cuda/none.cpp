// The CUDA backend of a build without nvcc: every question is answered with the same sentence.
#include "api/backend.h"

namespace flashtile::cuda {
namespace {

Status not_built() {
  return fail(FLASHTILE_NOT_BUILT,
              "device is FLASHTILE_CUDA; allowed: FLASHTILE_CPU, because this library was built "
              "without CUDA "
              "(configure with nvcc on PATH and -DFLASHTILE_CUDA=ON)");
}

}  // namespace

DeviceScope::~DeviceScope() = default;
Status DeviceScope::enter(Device&) { return not_built(); }

Status choose(const ForwardParams&, const Scores&, DeviceScope&, Plan<ForwardParams>&) {
  return not_built();
}
Status choose(const BackwardParams&, const Scores&, DeviceScope&, Plan<BackwardParams>&) {
  return not_built();
}
Status run(const ForwardParams&, const Scores&, const Plan<ForwardParams>&, CUstream_st*) {
  return not_built();
}
Status run(const BackwardParams&, const Scores&, const Plan<BackwardParams>&, CUstream_st*) {
  return not_built();
}
Status can_append_kv(const AppendParams&, int) { return not_built(); }
Status append_kv(const AppendParams&, int, CUstream_st*) { return not_built(); }
Status check_cache(const Problem&, flashtile_cache_report*, int, CUstream_st*) {
  return not_built();
}
const char* architectures() { return ""; }
const char* head_dims() { return ""; }

}  // namespace flashtile::cuda
