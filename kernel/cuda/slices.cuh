// A slice: one pass, one family of kernels, one head dim, one variant. CMake compiles flash.cu once
// for each;
// the launchers of the passes (forward/, decode/, backward/) define what it instantiates, and
// choose.cu has the table of all slices of a build.
#pragma once

#include <cstddef>
#include <type_traits>

#include "config.cuh"
#include "cuda/device.h"
#include "params.h"
#include "status.h"

namespace flashtile {

enum class Pass {
  kForward,  // also writes softmax_lse
  kPrefill,  // the forward's loop over a key/value cache
  kDecode,   // few queries over a key/value cache
  kBackward,
};

enum class Family {
  kSm80Large,  // mma.sync, 163 KB of shared memory a block
  kSm80Small,  // mma.sync, 99 KB
  kSm90,       // wgmma and TMA: sm_90a alone
};

constexpr Memory memory_of(Family family) {
  return family == Family::kSm80Small ? Memory::kSmall : Memory::kLarge;
}
inline Memory memory_of(const cuda::Device& device) {
  return device.shared_memory >= shared_memory_limit(Memory::kLarge) ? Memory::kLarge
                                                                     : Memory::kSmall;
}

template <Pass kPass, Family kFamily, int kHeadDim, Variant kVariant = Variant::kPlain>
struct Slice {
  using Params = std::conditional_t<kPass == Pass::kBackward, BackwardParams, ForwardParams>;
  // Picks dtype and mask at run time, launches, and returns. The device is the current one.
  // `scores` is for Variant::kModified.
  static Status launch(const Params& params, const Scores& scores, const cuda::Device& device,
                       CUstream_st* stream);
  // Bytes of params.workspace that launch() uses.
  static size_t workspace_bytes(const Problem& problem);
};

// Passes without a workspace.
template <Pass kPass, Family kFamily, int kHeadDim, Variant kVariant>
size_t slice_workspace(Slice<kPass, kFamily, kHeadDim, kVariant>, const Problem&) {
  return 0;
}

// Calls f with a value of the elements' type.
template <class F>
Status with_dtype(const Problem& problem, F f) {
  return problem.dtype == Dtype::kFloat16 ? f(__half()) : f(__nv_bfloat16());
}

}  // namespace flashtile
