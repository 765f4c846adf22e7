// Decoding over mma.sync for one head dim and one memory class. CMake compiles this file once per
// (head dim, memory class), with the two macros set.
#include "decode/launch_sm80.cuh"

#if !defined(FLASHTILE_HEAD_DIM) || !defined(FLASHTILE_MEMORY)
#error "compile with -DFLASHTILE_HEAD_DIM=64 -DFLASHTILE_MEMORY=kLarge"
#endif

namespace flashtile {

template Status launch_decode_sm80<FLASHTILE_HEAD_DIM, Memory::FLASHTILE_MEMORY>(
    const ForwardParams& params, CUstream_st* stream);
template size_t decode_workspace_sm80<FLASHTILE_HEAD_DIM, Memory::FLASHTILE_MEMORY>(
    const Problem& problem);

}  // namespace flashtile
