// The forward's loop over a key/value cache for one head dim and one memory class. CMake compiles
// this file once per (head dim, memory class), with the two macros set.
#include "forward/prefill_sm80.cuh"

#if !defined(FLASHTILE_HEAD_DIM) || !defined(FLASHTILE_MEMORY)
#error "compile with -DFLASHTILE_HEAD_DIM=64 -DFLASHTILE_MEMORY=kLarge"
#endif

namespace flashtile {

template Status launch_prefill_sm80<FLASHTILE_HEAD_DIM, Memory::FLASHTILE_MEMORY>(
    const ForwardParams& params, CUstream_st* stream);

}  // namespace flashtile
