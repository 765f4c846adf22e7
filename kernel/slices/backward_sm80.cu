// One slice of the mma.sync backward. CMake compiles this file once per head dimension and memory
// class, each with FLASHTILE_HEAD_DIM (64, 128) and FLASHTILE_MEMORY (kLarge, kSmall) defined.
#include "backward/launch_sm80.cuh"

namespace flashtile {

template Status launch_backward_sm80<FLASHTILE_HEAD_DIM, Memory::FLASHTILE_MEMORY>(
    const BackwardParams& params, CUstream_st* stream);

template size_t backward_workspace_sm80<FLASHTILE_HEAD_DIM, Memory::FLASHTILE_MEMORY>(
    const Problem& problem);

}  // namespace flashtile
