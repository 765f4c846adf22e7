// START HERE: the forward and backward kernels of flashtile.
//
// CMake compiles this file once a slice: a pass, a family of kernels, a head dim and a variant,
// which five macros name. FLASHTILE_PASS_HEADER is one of these, so that a change of one pass
// compiles its own slices only:
//
//   forward/sm80.cuh            forward, cp.async + mma.sync (sm_80, sm_89 and all later ones)
//   forward/sm90.cuh            forward, TMA + wgmma (sm_90a)
//   forward/prefill_sm80.cuh    the forward's loop over a key/value cache, many queries
//   forward/prefill_sm90.cuh    the same for sm_90a
//   decode/launch_sm80.cuh      few queries over a key/value cache: few.cuh and many.cuh, then
//                               combine.cuh; plan.cuh says who does what
//   backward/launch_sm80.cuh    backward: delta.cuh, then sm80.cuh, then dq.cuh
//   backward/launch_sm90.cuh    the same for sm_90a: sm90.cuh
//
// What they stand on, and what stands around them:
//
//   config.cuh       tuning table;  launch.cuh: the only __global__ function
//   tile/, ptx/      the words the loops are written in; one function = one instruction
//   tile/scores.cuh  what stands between Q K^T and P V in the variant kModified
//   params.h         what a kernel is given;  cache.h: what a cache's lengths and tables mean
//   api/             the C API: the caller's structs -> params.h, every refusal with its sentence
//   cuda/            choose.cu: which slice serves a call;  tensor_map.h: what TMA takes
//   cache_ops/       writing new rows to a cache, and checking its numbers
//   cpu/             the same op on the CPU, one object per instruction set
//   torch/           the same op for PyTorch, on top of the C API
#include FLASHTILE_PASS_HEADER

namespace flashtile {

using CompiledSlice = Slice<Pass::FLASHTILE_PASS, Family::FLASHTILE_FAMILY, FLASHTILE_HEAD_DIM,
                            Variant::FLASHTILE_VARIANT>;

template <>
Status CompiledSlice::launch(const Params& params, const Scores& scores, const cuda::Device& device,
                             CUstream_st* stream) {
  return launch_slice(CompiledSlice(), params, scores, device, stream);
}

template <>
size_t CompiledSlice::workspace_bytes(const Problem& problem) {
  return slice_workspace(CompiledSlice(), problem);
}

}  // namespace flashtile
